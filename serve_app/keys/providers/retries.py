"""How long a key service is asked before its caller is turned away.

An upload waits for its key to be wrapped, so that seconds are all there is. A service that has
just not answered is not asked again for a moment: else every request would wait for the same
time-out, each in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
import logging
import time
from typing import TypeVar

from tenacity import (
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_exponential,
    wait_random,
)

from serve_app.domain.errors import KeyProviderUnavailable

#: What one request may take, in seconds: to connect, and to answer.
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 1.0, 2.0

_FIRST_WAIT_S, _REST_S = 0.1, 1.0

_Answer = TypeVar("_Answer")

_log = logging.getLogger("derm.keys")


class Unanswered(Exception):
    """The service was not reached, not in time, or is in trouble of its own: asking again may help."""


class RetryPolicy:
    """Asks one service up to three times, waiting longer each time; for many threads at once.

    No request begins later than 4 s after the first. After a failure everybody is turned away
    for 1 s without asking.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._rests_until = 0.0

    def ask(self, question: Callable[[], _Answer]) -> _Answer:
        """Return the answer. KeyProviderUnavailable when `question` keeps raising Unanswered."""
        if time.monotonic() < self._rests_until:
            raise self._unavailable("has just failed")
        retrying = Retrying(
            retry=retry_if_exception_type(Unanswered),
            stop=stop_after_attempt(3) | stop_before_delay(4.0),
            # At random a little longer, so that threads that failed together do not return together.
            wait=wait_exponential(multiplier=_FIRST_WAIT_S, exp_base=4) + wait_random(0, _FIRST_WAIT_S),
            reraise=True,
        )
        try:
            return retrying(question)
        except Unanswered as error:
            self._rests_until = time.monotonic() + _REST_S
            _log.warning("%s: %s, %d requests", self._service, error, retrying.statistics["attempt_number"])
            # Without its cause: a library's error holds the request, and that a data key.
            raise self._unavailable(str(error)) from None

    def _unavailable(self, why: str) -> KeyProviderUnavailable:
        return KeyProviderUnavailable(
            f"{self._service} does not answer ({why}); nothing was stored, try again."
        )

"""Canaries of a replica: known questions, put to the code that answers when a model is loaded and every hour.

Three wrong answers in a row and the replica answers nobody any more, and Ray Serve replaces it. A canary
has no time limit: one that is slow is not wrong. Nothing is kept but three gauges and a line in the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
import logging
from time import monotonic, time
from typing import Protocol

from serve_app.domain.errors import DermError, ModelContractError, StageFailed

EVERY_S = 3600.0
TRIES = 3
_log = logging.getLogger("derm.canary")

#: How far the answers are off, as a share of what is allowed; None: there is no canary.
Off = float | None


class Gauge(Protocol):
    """Ray Serve's, which adds deployment and replica."""

    def set(self, value: float) -> None:
        """Set it."""


def worst(proofs: Iterable[Off]) -> Off:
    """The greatest of several, as far as there is any."""
    return max((off for off in proofs if off is not None), default=None)


def require_right(model_id: str, prove: Callable[[], Off]) -> None:
    """Ask a model that is being loaded; raises ModelContractError when it answers wrongly three times."""
    off: Off = None
    for _ in range(TRIES):
        try:
            off = prove()
        except StageFailed:
            off = float("inf")
        if off is None or off <= 1.0:
            return
    raise ModelContractError(
        f"{model_id} does not give its known answer here: it is {off:.3g} times as far off as is allowed."
    )


class Canaries:
    """Whether a replica still answers rightly: `check` at a health check, `require_sound` at an answer."""

    def __init__(self, prove: Callable[[], Awaitable[Off]], gauge: Callable[[str, str], Gauge]) -> None:
        """`prove` asks; whatever it raises is a wrong answer, too."""
        self._prove = prove
        self._failures = gauge("derm_canary_failures", "Wrong answers to the canary in a row; 3: replaced")
        self._off = gauge("derm_canary_off", "How far the last answer was off, as a share of what is allowed")
        self._passed_at = gauge("derm_canary_passed_at", "When it was right last, Unix seconds; 0: no canary")
        self._failed, self._due, self._right = 0, 0.0, time()
        self._asking: asyncio.Task[None] | None = None

    def check(self) -> None:
        """Start the next canary when it is due: an hour after a right answer, at once after a wrong one.

        Raises StageFailed once three in a row were wrong.
        """
        self.require_sound()
        if monotonic() >= self._due and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask())

    def require_sound(self) -> None:
        """Raise StageFailed once three in a row were wrong: the replica is to be replaced, not to answer."""
        if self._failed >= TRIES:
            raise StageFailed("This replica gives wrong answers to its canary.")

    async def _ask(self) -> None:
        off: Off
        try:
            off, why = await self._prove(), "another answer"
        except Exception as error:  # noqa: BLE001 - ONNX Runtime's have no other common base
            off, why = float("inf"), str(error) if isinstance(error, DermError) else type(error).__name__
        if off is not None:
            self._off.set(off)
        if off is None or off <= 1.0:
            self._failed, self._due, self._right = 0, monotonic() + EVERY_S, time()
            self._passed_at.set(0.0 if off is None else self._right)
        else:
            self._failed += 1
            ago = time() - self._right
            _log.error(
                "Canary %d of %d failed, %.3g times what is allowed; the last was right %.0f s ago: %s",
                *(self._failed, TRIES, off, ago, why),
            )
        self._failures.set(self._failed)

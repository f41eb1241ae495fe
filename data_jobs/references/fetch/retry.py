"""Trying again: exponential backoff with full jitter, and a server's wish to be left alone heeded by all.

"Full jitter" is Brooker's (AWS Architecture Blog, 2015): wait a random part of the doubled time, so that those
who failed together do not come back together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
import random
import threading
import time
from typing import TypeVar

from data_jobs.references.fetch.errors import Stopped, Transient

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Backoff:
    """Waits between attempts, seconds; `longest_asked_s` is the most that a server's Retry-After may ask for."""

    first_s: float = 1.0
    longest_s: float = 60.0
    longest_asked_s: float = 300.0

    def wait_s(self, failed: int) -> float:
        """How long to wait after `failed` attempts, at random."""
        return random.uniform(0, min(self.longest_s, self.first_s * 2 ** (failed - 1)))  # noqa: S311


class Pace:
    """When requests may be made: shared by all threads of a fetch, and where it is told to stop."""

    def __init__(self, backoff: Backoff | None = None) -> None:
        self.backoff = backoff or Backoff()
        self._stop = threading.Event()
        self._not_before = 0.0

    def stop(self) -> None:
        """Make every thread raise Stopped at its next step."""
        self._stop.set()

    def step(self) -> None:
        """Raise Stopped if told to stop."""
        if self._stop.is_set():
            raise Stopped

    def insist(self, attempt: Callable[[], T], attempts: int) -> T:
        """The result of `attempt`, made up to `attempts` times while it raises Transient; then that is raised."""
        failed = 0
        while True:
            self._sleep(self._not_before - time.monotonic())
            try:
                return attempt()
            except Transient as error:
                failed += 1
                if error.wait_s is not None:
                    asked = min(error.wait_s, self.backoff.longest_asked_s)
                    self._not_before = max(self._not_before, time.monotonic() + asked)
                if failed >= attempts:
                    raise
                self._sleep(self.backoff.wait_s(failed))

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(max(0.0, seconds))
        self.step()


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or an HTTP date (RFC 9110, 10.2.3); None if neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())

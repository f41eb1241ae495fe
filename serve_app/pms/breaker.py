"""A circuit breaker: who has not answered several times in a row is not asked for a while.

Our own, because what is needed is forty lines: the libraries (purgatory, aiobreaker, pybreaker)
bring stores in Redis, factories and listeners, and count exceptions that here are answers.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from time import monotonic


class State(StrEnum):
    """Closed lets calls through, open refuses them, half-open lets one through as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class CircuitBreaker:
    """Opens after `failures` in a row; `rest_s` later one trial decides whether it closes again.

    Belongs to one event loop. `clock` gives seconds that never go back.
    """

    def __init__(
        self, *, failures: int = 5, rest_s: float = 10.0, clock: Callable[[], float] = monotonic
    ) -> None:
        self._limit = failures
        self._rest_s = rest_s
        self._clock = clock
        self._failures = 0
        self._opened_at: float | None = None
        self._trial_until = 0.0

    @property
    def state(self) -> State:
        """What the next call will find."""
        if self._opened_at is None:
            return State.CLOSED
        now = self._clock()
        if now < self._opened_at + self._rest_s or now < self._trial_until:
            return State.OPEN
        return State.HALF_OPEN

    def enter(self) -> bool:
        """Ask whether a call may go through; of those that come while half-open, one may.

        A trial that never reports (its task was cancelled) counts as failed after another rest.
        """
        state = self.state
        if state is State.HALF_OPEN:
            self._trial_until = self._clock() + self._rest_s
        return state is not State.OPEN

    def succeed(self) -> None:
        """Note an answer: whatever it said, somebody is there."""
        self._failures, self._opened_at, self._trial_until = 0, None, 0.0

    def fail(self) -> None:
        """Note that there was no answer."""
        self._failures += 1
        if self._failures >= self._limit:
            self._opened_at, self._trial_until = self._clock(), 0.0

"""How much may be under way in one process: requests and bytes, refused at the door, and how long a body may take.

What is refused here has cost nothing and is stored nowhere. What is let in fits in memory
and is answered while the caller still waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import Request

from serve_app.domain.errors import BodyTimeout, Overloaded

#: How long a body may take whatever its pace, and keeps its place whoever else needs it, seconds.
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class BodyPace:
    """What the whole of a body may take, and how fast it must come on average once GRACE_S is over."""

    timeout_s: float
    min_bytes_per_s: float


class Place:
    """What one request holds: memory for its body, and while that is being read, only as long as it comes on."""

    def __init__(self, size: int, pace: BodyPace) -> None:
        self.size = size
        self._pace = pace
        self._since: float | None = None
        self._wait: asyncio.Timeout | None = None
        self._cut_off = False

    async def read(self, request: Request) -> AsyncGenerator[bytes, None]:
        """Yield the body as it comes; BodyTimeout when it comes too slowly, or slowly and its place is needed."""
        clock, stream, received = asyncio.get_running_loop().time, request.stream(), 0
        self._since = since = clock()
        try:
            while not self._cut_off:
                allowed = min(self._pace.timeout_s, GRACE_S + received / self._pace.min_bytes_per_s)
                async with asyncio.timeout_at(since + allowed) as self._wait:
                    chunk = await anext(stream, None)
                self._wait = None
                if chunk is None:
                    return
                received += len(chunk)
                yield chunk
        except TimeoutError as error:
            raise BodyTimeout from error
        finally:
            self._since = self._wait = None
        raise BodyTimeout

    def is_slow(self) -> bool:
        """Whether its body has been coming for longer than GRACE_S."""
        return self._since is not None and asyncio.get_running_loop().time() - self._since > GRACE_S

    def cut_off(self) -> None:
        """End the reading of its body."""
        self._cut_off = True
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(0.0)


class AdmissionGate:
    """Counts uploads under way; `max_bytes` bounds what their bodies hold together."""

    def __init__(self, *, max_requests: int, max_bytes: int, pace: BodyPace) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.pace = pace
        #: Oldest first.
        self._places: list[Place] = []

    @contextmanager
    def enter(self, body_bytes: int) -> Iterator[Place]:
        """Hold a place for one upload of this size, or raise Overloaded.

        A body of unknown length counts as the largest allowed. One upload always fits. Where it is full, those
        whose bodies trickle give way, the oldest first: a crowd that sends half of its bodies stops nobody.
        """
        kept = self._places.copy()
        slow = [place for place in kept if place.is_slow()]
        while not self._fits(kept, body_bytes):
            if not slow:
                raise Overloaded
            kept.remove(slow.pop(0))
        for place in set(self._places) - set(kept):
            place.cut_off()
        self._places = [*kept, place := Place(body_bytes, self.pace)]
        try:
            yield place
        finally:
            if place in self._places:
                self._places.remove(place)

    def _fits(self, places: list[Place], body_bytes: int) -> bool:
        return len(places) < self._max_requests and (
            not places or sum(place.size for place in places) + body_bytes <= self._max_bytes
        )

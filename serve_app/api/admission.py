"""How much may be under way in one process: requests and bytes, refused at the door.

What is refused here has cost nothing and is stored nowhere. What is let in fits in memory
and is answered while the caller still waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serve_app.domain.errors import Overloaded


class AdmissionGate:
    """Counts uploads under way; `max_bytes` bounds what their bodies hold together."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0

    @contextmanager
    def enter(self, body_bytes: int) -> Iterator[None]:
        """Hold a place for one upload of this size, or raise Overloaded.

        A body of unknown length counts as the largest allowed. One upload always fits.
        """
        full = self._requests >= self._max_requests
        heavy = self._requests > 0 and self._bytes + body_bytes > self._max_bytes
        if full or heavy:
            raise Overloaded
        self._requests += 1
        self._bytes += body_bytes
        try:
            yield
        finally:
            self._requests -= 1
            self._bytes -= body_bytes

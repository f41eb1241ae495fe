"""What the PMS said a moment ago: bounded in number and age, in memory only.

It holds patients' data. It is never written anywhere, has no representation that shows it, and
ends with the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Generic, TypeVar

_Value = TypeVar("_Value")


class BriefCache(Generic[_Value]):
    """Values by id, at most `entries`, none older than `max_age_s`; 0 keeps nothing.

    The one not used for longest goes first. `clock` gives seconds that never go back.
    """

    def __init__(
        self, *, max_age_s: float, entries: int = 2_000, clock: Callable[[], float] = monotonic
    ) -> None:
        self._max_age_s = max_age_s
        self._limit = entries
        self._clock = clock
        self._kept: OrderedDict[str, tuple[float, _Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> _Value | None:
        """Find a value that is young enough."""
        found = self._kept.get(key)
        if found is None:
            return None
        kept_at, value = found
        if self._clock() - kept_at >= self._max_age_s:
            del self._kept[key]
            return None
        self._kept.move_to_end(key)
        return value

    def put(self, key: str, value: _Value) -> None:
        """Keep a value; whatever is too old, or too much, is forgotten."""
        now = self._clock()
        self._kept.pop(key, None)
        for old in [name for name, (at, _) in self._kept.items() if now - at >= self._max_age_s]:
            del self._kept[old]
        if self._max_age_s > 0:
            self._kept[key] = now, value
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

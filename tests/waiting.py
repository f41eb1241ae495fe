"""Wait for what other processes do."""

from __future__ import annotations

from collections.abc import Callable
import time


def until(condition: Callable[[], object], within_s: float = 30.0, every_s: float = 0.02) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(every_s)
    return bool(condition())

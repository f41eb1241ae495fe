"""How long a job still takes, for a person."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 3 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

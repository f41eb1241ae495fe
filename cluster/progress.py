"""What a person at the terminal sees while things start: a line a step, with the seconds so far."""

from __future__ import annotations

import sys
import time

_started = time.monotonic()


def report(message: str) -> None:
    """Print a step with the seconds since this process started."""
    sys.stdout.write(f"[{time.monotonic() - _started:6.1f} s] {message}\n")
    sys.stdout.flush()

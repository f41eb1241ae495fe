"""What a person sees while images arrive: a line every few seconds on standard error."""

from __future__ import annotations

from collections import Counter
import sys
import threading
import time
from typing import TextIO

from data_jobs.references.duration import duration

MB = 1_000_000


class Progress:
    """Counts of one run, told from any thread. `there`: images that were whole before it began."""

    def __init__(
        self, total: int, there: int = 0, *, interval_s: float = 5.0, to: TextIO | None = None
    ) -> None:
        self.interval_s = interval_s
        self._total = total
        self._there = there
        self._stored = 0
        self._bytes = 0
        self._failed: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._started = self._told = time.monotonic()
        self._to = to or sys.stderr

    def stored(self, size: int) -> None:
        """One more image, of so many bytes."""
        with self._lock:
            self._stored += 1
            self._bytes += size

    def failed(self, cause: str) -> None:
        """One more failure."""
        with self._lock:
            self._failed[cause] += 1

    def tell(self) -> None:
        """Print a line unless the last is fresher than the interval."""
        now = time.monotonic()
        if now - self._told >= self.interval_s:
            self._told = now
            self._to.write(self.line(now - self._started) + "\n")
            self._to.flush()

    def line(self, elapsed_s: float) -> str:
        """Done, rate, time left, failures by cause."""
        with self._lock:
            done, failed = self._there + self._stored, self._failed.total()
            causes = ", ".join(f"{cause} {count}" for cause, count in self._failed.most_common())
            handled, received = self._stored + failed, self._bytes
        rate = handled / max(elapsed_s, 1e-9)
        left = max(0, self._total - done - failed)
        line = f"{done:,} of {self._total:,} images ({done / max(1, self._total):.0%})"
        line += f", {rate:.1f}/s, {received / MB / max(elapsed_s, 1e-9):.1f} MB/s"
        if left and rate:
            line += f", {duration(left / rate)} left"
        return f"{line}; {failed:,} failed: {causes}" if failed else line

"""What a person sees of a long job: how many images are done, how fast, how long still, what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
import threading
from time import monotonic

from data_jobs.references.duration import duration


def describe(done: int, total: int, seconds: float, failures: Mapping[str, int], *, before: int = 0) -> str:
    """One line. `done` of `total` images after `seconds`; `before` of them were done by an earlier run."""
    rate = (done - before) / seconds if seconds > 0 else 0.0
    left = f"{duration((total - done) / rate)} left" if rate > 0 else "estimating"
    failed = ", ".join(f"{count} {cause}" for cause, count in failures.items())
    share = 100.0 * done / total if total else 100.0
    return (
        f"{done:,} of {total:,} images ({share:.1f} %), {rate:.1f} a second, {left}; "
        f"{'failed: ' + failed if failed else 'none failed'}"
    )


class ProgressDisplay:
    """Counts what a run has done, and prints a line every few seconds while a `with` block runs."""

    def __init__(self, total: int, *, before: int, say: Callable[[str], None], every_s: float = 10.0) -> None:
        self._total, self._before = total, before
        self._done, self._failures = before, Counter[str]()
        self._say, self._every_s = say, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def note(self, causes: Iterable[str | None]) -> None:
        """Count images that are done: the cause of each one's failure, or None."""
        for cause in causes:
            self._done += 1
            if cause is not None:
                self._failures[cause] += 1

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _show(self) -> None:
        started = monotonic()
        while not self._over.wait(self._every_s):
            seconds = monotonic() - started
            self._say(describe(self._done, self._total, seconds, dict(self._failures), before=self._before))

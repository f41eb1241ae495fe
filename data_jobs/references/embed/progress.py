"""What a person sees of a long job: how many images are done, how fast, how long still, what failed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """Prints a line every few seconds while a `with` block runs, from what `look` finds.

    `look` gives how many images are done and the failures by cause; when it fails the display is
    silent for that once, for it must never end the job that it shows.
    """

    def __init__(
        self,
        look: Callable[[], tuple[int, Mapping[str, int]]],
        total: int,
        *,
        before: int,
        say: Callable[[str], None],
        every_s: float = 10.0,
    ) -> None:
        self._look, self._total, self._before = look, total, before
        self._say, self._every_s = say, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _show(self) -> None:
        started = monotonic()
        while not self._over.wait(self._every_s):
            try:
                done, failures = self._look()
            except Exception as error:  # noqa: BLE001 - see the class
                self._say(f"progress unknown: {error}")
                continue
            self._say(describe(done, self._total, monotonic() - started, failures, before=self._before))

"""Fetching many images at once: bounded, resumable, and going on when one fails."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import queue
import re
import threading

from data_jobs.references.catalogue import IMAGES, CatalogueEntry, image_path
from data_jobs.references.fetch.errors import FetchError, ImageFailure, Stopped, Transient
from data_jobs.references.fetch.image_file import PARTIAL, StoredImage, is_stored, store_image
from data_jobs.references.fetch.progress import Progress
from data_jobs.references.fetch.retry import Pace
from data_jobs.references.fetch.source import Source

#: So many failures in a row, each after all its attempts, and the source counts as not answering.
GIVE_UP_AFTER = 20
JOURNAL = "fetched.csv"
_LEAVE_S = 5.0
_NOTE = re.compile(r"(ISIC_[0-9]{7,10}),([0-9]{1,12}),([0-9a-f]{64})")


def stored_images(output: Path, threads: int) -> dict[str, StoredImage]:
    """The images of earlier runs that are as they were then, by isic_id; what was left half done is removed.

    A file of which the journal knows nothing does not count: libjpeg decodes a picture whose end is all zeros,
    as a power cut may leave it, without a word.
    """
    for partial in (output / IMAGES).glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
    noted = list({image.isic_id: image for image in _noted(output / JOURNAL)}.values())
    pool = ThreadPoolExecutor(threads)
    try:
        same = pool.map(lambda image: is_stored(image, output / image_path(image.isic_id)), noted)
        return {image.isic_id: image for image, is_same in zip(noted, same, strict=True) if is_same}
    finally:
        # Interrupted, it must not go through all the others first.
        pool.shutdown(cancel_futures=True)


class Download:
    """One run over the images that are missing. `stored` and `failed` fill up while it runs."""

    def __init__(self, source: Source, output: Path, pace: Pace, progress: Progress) -> None:
        self.stored: list[StoredImage] = []
        self.failed: dict[str, ImageFailure] = {}
        self._source = source
        self._output = output
        self._pace = pace
        self._progress = progress
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._working = 0
        self._idle = threading.Event()
        self._fatal: Exception | None = None

    def run(self, entries: Iterable[CatalogueEntry], threads: int) -> None:
        """Fetch the entries' images with so many threads; returns when each is stored or failed.

        Raises FetchError when the source does not answer any more, OSError when nothing can be written. Stopped by
        an exception (KeyboardInterrupt), it leaves what is whole, and nothing under a wrong name.
        """
        waiting: queue.SimpleQueue[CatalogueEntry] = queue.SimpleQueue()
        for entry in entries:
            waiting.put(entry)
        self._working = threads
        try:
            for _ in range(threads):
                # Daemons: one that waits for a dead connection does not keep the process from leaving.
                threading.Thread(target=self._work, args=(waiting,), daemon=True).start()
            # Not join(): interrupted there, Python 3.11 takes a running thread for one that has ended.
            while not self._idle.wait(self._progress.interval_s):
                self._progress.tell()
        except BaseException:
            self._pace.stop()
            self._idle.wait(_LEAVE_S)
            raise
        if self._fatal is not None:
            raise self._fatal

    def _work(self, waiting: queue.SimpleQueue[CatalogueEntry]) -> None:
        try:
            while True:
                self._fetch(waiting.get_nowait())
        except (queue.Empty, Stopped):
            pass
        # Whatever it is, the others must not go on as if nothing had happened, nor run() say so.
        except Exception as error:  # noqa: BLE001
            self._abort(error)
        finally:
            with self._lock:
                self._working -= 1
                if not self._working:
                    self._idle.set()

    def _fetch(self, entry: CatalogueEntry) -> None:
        file = self._output / entry.path
        try:
            image = self._pace.insist(
                lambda: store_image(self._source, entry.isic_id, file, self._pace), self._source.attempts
            )
        except ImageFailure as error:
            self._fail(entry.isic_id, error)
            return
        with self._lock:
            self._in_a_row = 0
            self._note(image)
            self.stored.append(image)
        self._progress.stored(image.bytes)

    def _fail(self, isic_id: str, error: ImageFailure) -> None:
        with self._lock:
            self.failed[isic_id] = error
            self._in_a_row = self._in_a_row + 1 if isinstance(error, Transient) else 0
            in_a_row = self._in_a_row
        self._progress.failed(error.cause)
        if in_a_row >= GIVE_UP_AFTER and self._source.attempts > 1:
            raise FetchError(
                f"The {self._source.name} does not answer: {in_a_row} images in a row failed, the last one with: "
                f"{error} Run this again later; what has been fetched stays."
            )

    def _note(self, image: StoredImage) -> None:
        with (self._output / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{image.isic_id},{image.bytes},{image.sha256}\n")

    def _abort(self, error: Exception) -> None:
        with self._lock:
            self._fatal = self._fatal or error
        self._pace.stop()


def _noted(journal: Path) -> Iterator[StoredImage]:
    if journal.is_file():
        for line in journal.read_text(encoding="utf-8", errors="replace").splitlines():
            # A torn line is as good as none.
            if found := _NOTE.fullmatch(line):
                yield StoredImage(found[1], int(found[2]), found[3])

"""Fetching many images at once: whole, checked, resumable, and going on when one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
import hashlib
from pathlib import Path
import queue
import re
import shutil
import threading

from tqdm import tqdm

from data_jobs.references.catalogue import ARCHIVE_LIMITS, IMAGES, CatalogueEntry, image_path
from data_jobs.references.fetch.http import FetchError, ImageFailure, Pace, Refused, Stopped, Transient
from data_jobs.references.fetch.sources import Source
from deployments.preprocess.decode import decode_image, sniff_content_type
from serve_app.domain.errors import ImageTooSmall, RejectedUpload, TooLarge

PARTIAL = ".partial"
# Decoded small: every byte of the picture is gone through all the same.
_CHECK_SIDE = 224


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A file that was checked: `bytes` and `sha256` (hex) are its own."""

    isic_id: str
    bytes: int
    sha256: str


def store_image(source: Source, isic_id: str, file: Path, pace: Pace) -> StoredImage:
    """Fetch one image, in one attempt. Raises Transient, Refused, or Stopped; OSError when it can not be written.

    It is written beside its place and renamed when whole. Not flushed to the disk: what a power cut
    damages is found by its digest when the fetch is run again.
    """
    partial = file.with_name(file.name + PARTIAL)
    data = bytearray()
    try:
        with source.open(isic_id) as body, partial.open("wb") as written:
            for chunk in body.chunks:
                pace.step()
                data += chunk
                if len(data) > ARCHIVE_LIMITS.max_bytes:
                    raise Refused(f"{isic_id} has more than {ARCHIVE_LIMITS.max_bytes} bytes.", "too large")
                written.write(chunk)
        if body.length not in {None, len(data)}:
            raise Transient(f"{isic_id}: {len(data)} bytes came, not {body.length}.", "wrong length")
        check_jpeg(isic_id, bytes(data))
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return StoredImage(isic_id, len(data), hashlib.sha256(data).hexdigest())


def is_stored(image: StoredImage, file: Path) -> bool:
    """Whether the file still is what it was when it was checked."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return len(data) == image.bytes and hashlib.sha256(data).hexdigest() == image.sha256


def check_jpeg(isic_id: str, data: bytes) -> None:
    """Raise Transient for what is no whole JPEG, Refused for one that the service would not take."""
    try:
        if sniff_content_type(data) != "image/jpeg":
            # An error page of something on the way, mostly: worth another attempt.
            raise Transient(f"{isic_id} came as something that is no JPEG.", "no JPEG")
        decode_image(data, ARCHIVE_LIMITS, target_side=_CHECK_SIDE)
    except (TooLarge, ImageTooSmall) as error:
        raise Refused(f"{isic_id}: {error}", type(error).code) from error
    except RejectedUpload as error:
        raise Transient(f"{isic_id}: {error}", "no whole JPEG") from error


#: Where no size is known at all: a dermoscopic JPEG of the archive, bytes.
TYPICAL = 2_000_000
#: Left free beside the images: file-system blocks, the catalogue, and the rest of the machine, bytes.
RESERVE = 512 * 1024 * 1024
_GB = 1e9


def needed_bytes(entries: Iterable[CatalogueEntry]) -> int:
    """Bytes of the entries' images; one whose size is not known counts as the mean of the others."""
    sizes = [entry.bytes for entry in entries]
    known = [size for size in sizes if size is not None]
    typical = sum(known) // len(known) if known else TYPICAL
    return sum(known) + typical * (len(sizes) - len(known))


def check_space(folder: Path, entries: Iterable[CatalogueEntry]) -> int:
    """Bytes that the images need. Raises FetchError when the folder's disk has no room for them and the reserve."""
    needed = needed_bytes(entries)
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise FetchError(
            f"The images need {needed / _GB:.1f} GB and {RESERVE / _GB:.1f} GB are to stay free, "
            f"but {folder} has {free / _GB:.1f} GB. Make room, name another --output, or a smaller --count."
        )
    return needed


#: So many failures in a row, each after all its attempts, and the source counts as not answering.
GIVE_UP_AFTER = 20
JOURNAL = "fetched.csv"
_LEAVE_S = 5.0
_TELL_S = 5.0
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

    def __init__(self, source: Source, output: Path, pace: Pace) -> None:
        self.stored: list[StoredImage] = []
        self.failed: dict[str, ImageFailure] = {}
        self._source = source
        self._output = output
        self._pace = pace
        self._received = 0
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._working = 0
        self._idle = threading.Event()
        self._fatal: Exception | None = None

    def run(self, entries: Sequence[CatalogueEntry], threads: int, *, there: int = 0) -> None:
        """Fetch the entries' images with so many threads; returns when each is stored or failed.

        `there`: images that were whole before, for the progress on standard error.
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
            total = there + len(entries)
            with tqdm(total=total, initial=there, unit=" images", mininterval=_TELL_S) as bar:
                while not self._idle.wait(_TELL_S):
                    self._tell(bar, there)
                self._tell(bar, there)
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
            self._received += image.bytes

    def _fail(self, isic_id: str, error: ImageFailure) -> None:
        with self._lock:
            self.failed[isic_id] = error
            self._in_a_row = self._in_a_row + 1 if isinstance(error, Transient) else 0
            in_a_row = self._in_a_row
        if in_a_row >= GIVE_UP_AFTER and self._source.attempts > 1:
            raise FetchError(
                f"The {self._source.name} does not answer: {in_a_row} images in a row failed, the last one with: "
                f"{error} Run this again later; what has been fetched stays."
            )

    def _tell(self, bar: tqdm, there: int) -> None:
        with self._lock:
            bar.n = there + len(self.stored)
            causes = Counter(error.cause for error in self.failed.values())
            bar.set_postfix({"MB": f"{self._received / 1e6:,.0f}", **causes}, refresh=False)
        bar.refresh()

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

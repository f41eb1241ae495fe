"""Fetching many images at once: whole, checked, resumable, and going on when one fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
import hashlib
from pathlib import Path
import re
import shutil

from tqdm import tqdm

from data_jobs.references.catalogue import ARCHIVE_LIMITS, IMAGES, CatalogueEntry, image_path
from data_jobs.references.fetch.http import FetchError, ImageFailure, Pace, Refused, Transient
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


def store_image(source: Source, isic_id: str, file: Path) -> StoredImage:
    """Fetch one image, in one attempt. Raises Transient, Refused, or Stopped; OSError when it can not be written.

    It is written beside its place and renamed when whole. Not flushed to the disk: what a power cut
    damages is found by its digest when the fetch is run again.
    """
    data = source.read(isic_id)
    check_jpeg(isic_id, data)
    partial = file.with_name(file.name + PARTIAL)
    partial.write_bytes(data)
    partial.replace(file)
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


def check_space(folder: Path, entries: Iterable[CatalogueEntry]) -> int:
    """Bytes that the images need; one whose size is not known counts as the mean of the others.

    Raises FetchError when the folder's disk has no room for them and the reserve.
    """
    sizes = [entry.bytes for entry in entries]
    known = [size for size in sizes if size is not None]
    typical = sum(known) // len(known) if known else TYPICAL
    needed = sum(known) + typical * (len(sizes) - len(known))
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
_NOTE = re.compile(r"(ISIC_[0-9]{7,10}),([0-9]{1,12}),([0-9a-f]{64})")


def stored_images(output: Path, threads: int) -> dict[str, StoredImage]:
    """The images of earlier runs that are as they were then, by isic_id; what was left half done is removed.

    A file of which the journal knows nothing does not count: libjpeg decodes a picture whose end is all zeros,
    as a power cut may leave it, without a word.
    """
    for partial in (output / IMAGES).glob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)
    journal = output / JOURNAL
    lines = journal.read_text(encoding="utf-8", errors="replace").splitlines() if journal.is_file() else []
    # A torn line is as good as none.
    notes = [found for line in lines if (found := _NOTE.fullmatch(line))]
    noted = list({note[1]: StoredImage(note[1], int(note[2]), note[3]) for note in notes}.values())
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
        self._source, self._output, self._pace = source, output, pace
        self._in_a_row = 0

    def run(self, entries: Sequence[CatalogueEntry], threads: int, *, there: int = 0) -> None:
        """Fetch the entries' images with so many threads; returns when each is stored or failed.

        `there`: images that were whole before, for the progress on standard error.
        Raises FetchError when the source does not answer any more, OSError when nothing can be written. Stopped by
        an exception (KeyboardInterrupt), it leaves what is whole, and nothing under a wrong name.
        """
        pool = ThreadPoolExecutor(threads)
        fetching = {pool.submit(self._fetch, entry): entry.isic_id for entry in entries}
        try:
            with tqdm(total=there + len(entries), initial=there, unit=" images", mininterval=5.0) as bar:
                for done in as_completed(fetching):
                    self._take(fetching[done], done)
                    bar.n = there + len(self.stored)
                    bar.set_postfix(Counter(error.cause for error in self.failed.values()), refresh=False)
                    bar.update(0)
        except BaseException:
            self._pace.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _fetch(self, entry: CatalogueEntry) -> StoredImage:
        file = self._output / entry.path
        return self._pace.retry(lambda: store_image(self._source, entry.isic_id, file), self._source.attempts)

    def _take(self, isic_id: str, done: Future[StoredImage]) -> None:
        try:
            image = done.result()
        except ImageFailure as error:
            self.failed[isic_id] = error
            self._in_a_row = self._in_a_row + 1 if isinstance(error, Transient) else 0
            if self._in_a_row >= GIVE_UP_AFTER and self._source.attempts > 1:
                raise FetchError(
                    f"The {self._source.name} does not answer: {self._in_a_row} images in a row failed, the last one "
                    f"with: {error} Run this again later; what has been fetched stays."
                ) from error
            return
        self._in_a_row = 0
        with (self._output / JOURNAL).open("a", encoding="utf-8") as journal:
            journal.write(f"{image.isic_id},{image.bytes},{image.sha256}\n")
        self.stored.append(image)

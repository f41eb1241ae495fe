"""The fetch from end to end: list, choose, check the disk, fetch many images at once, describe.

What a folder is to hold is chosen once, so that running again fetches what is missing and nothing else:
`selection.parquet` has the chosen entries, `selection.json` what they were chosen by and from. The latter is
written last: while it is not there, nothing has been chosen.

Until then `listing.jsonl` has one line a page that was listed: the entries of its candidates, how many others were
left out for which cause, and where the next page begins. A torn last line counts as not written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
import csv
from dataclasses import asdict, dataclass, replace
import fcntl
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
from typing import Any

from pydantic import TypeAdapter
from tqdm import tqdm

from data_jobs.references.catalogue import (
    ARCHIVE_LIMITS,
    IMAGES,
    CatalogueEntry,
    image_path,
    read_catalogue,
    write_catalogue,
)
from data_jobs.references.fetch.eligibility import Eligibility, LeftOut
from data_jobs.references.fetch.http import FetchError, ImageFailure, Pace, Refused, Transient
from data_jobs.references.fetch.selection import Selection, choose
from data_jobs.references.fetch.sources import Source
from deployments.preprocess.decode import decode_image, sniff_content_type
from serve_app.domain.errors import Conflict, ImageTooSmall, RejectedUpload, TooLarge

LISTING = "listing.jsonl"
ENTRIES = "selection.parquet"
PARAMETERS = "selection.json"
FAILURES = "failures.csv"


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen entries; `candidates` they were chosen from, `left_out` images were none, by cause."""

    entries: list[CatalogueEntry]
    candidates: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fetch left: the images that are whole, and why others are missing, by isic_id."""

    plan: Plan
    entries: list[CatalogueEntry]
    fetched: int
    failures: Mapping[str, ImageFailure]


def fetch(
    source: Source,
    output: Path,
    selection: Selection,
    eligibility: Eligibility,
    pace: Pace,
    *,
    threads: int,
    say: Callable[[str], None],
) -> Outcome:
    """Make `output` a folder of reference images, or finish what an earlier run began there.

    Raises FetchError when the source does not answer or the disk is full, Conflict when the folder is another
    fetch's. An image that can not be had does not stop it: it is in `failures.csv` with its cause.
    """
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    with only_one(output):
        plan = _plan(source, output, selection, eligibility)
        stored = stored_images(output, threads)
        missing = [entry for entry in plan.entries if entry.isic_id not in stored]
        needed = check_space(output, missing)
        wanted, here = len(plan.entries), len(plan.entries) - len(missing)
        say(f"{wanted:,} images: {here:,} are here, {len(missing):,} to fetch, {needed / 1e6:,.0f} MB")
        download = Download(source, output, pace)
        download.run(missing, threads, there=here)
        stored |= {image.isic_id: image for image in download.stored}
        entries = [
            replace(entry, bytes=stored[entry.isic_id].bytes, sha256=stored[entry.isic_id].sha256)
            for entry in plan.entries
            if entry.isic_id in stored
        ]
        _write_failures(output / FAILURES, download.failed)
        write_catalogue(output, entries)
        return Outcome(plan, entries, len(download.stored), download.failed)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keep other fetches out of the folder. Raises Conflict when one is at work there."""
    with (output / "fetch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"Another fetch is at work in {output}.") from error
        yield


def _plan(source: Source, output: Path, selection: Selection, eligibility: Eligibility) -> Plan:
    """The folder's plan, made now when it has none. Raises Conflict when it was made with other options."""
    excluded = "\n".join(sorted(eligibility.excluded)).encode()
    parameters = {
        "source": source.name,
        **source.parameters,
        **asdict(selection),
        "licence": sorted(eligibility.licences),
        "unconfirmed": eligibility.unconfirmed,
        "excluded": hashlib.sha256(excluded).hexdigest() if excluded else None,
    }
    file = output / PARAMETERS
    if file.is_file():
        written = json.loads(file.read_text(encoding="utf-8"))
        before = written["parameters"]
        names = sorted({*before, *parameters})
        if changed := [name for name in names if before.get(name) != parameters.get(name)]:
            told = "; ".join(f"{name} was {before.get(name)}, is {parameters.get(name)}" for name in changed)
            raise Conflict(f"{output} was begun with other options ({told}). Name another --output.")
        return Plan(read_catalogue(output, ENTRIES), written["candidates"], written["left_out"])
    pages = list_candidates(source, eligibility, output / LISTING, parameters)
    candidates = [entry for page in pages for entry in page.entries]
    total = sum((Counter(page.left_out) for page in pages), Counter[LeftOut]())
    left_out = {cause.value: count for cause, count in total.most_common()}
    plan = Plan(choose(candidates, selection), len(candidates), left_out)
    if not plan.entries:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in left_out.items())
        seen = len(candidates) + total.total()
        raise FetchError(f"None of {seen:,} images can be a reference ({causes or 'there are none'}).")
    write_catalogue(output, plan.entries, ENTRIES)
    written = {"parameters": parameters, "candidates": plan.candidates, "left_out": left_out}
    partial = output / f"{PARAMETERS}.partial"
    partial.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    (output / LISTING).unlink()
    return plan


@dataclass(frozen=True, slots=True)
class ListedPage:
    """A line of the listing. `cursor`: where the next page begins, None when a listing cannot go on there."""

    entries: list[CatalogueEntry]
    left_out: dict[LeftOut, int]
    cursor: str | None


_LINE = TypeAdapter(ListedPage)


def list_candidates(
    source: Source, eligibility: Eligibility, journal: Path, parameters: Mapping[str, Any]
) -> list[ListedPage]:
    """Go through a source's pages, or through those after the last one that the journal has."""
    pages = _read_listing(journal, parameters)
    try:
        _list(source, eligibility, journal, parameters, pages)
    except Refused:
        if not pages or pages[-1].cursor is None:
            raise
        # The archive knows the old cursor no more.
        pages = []
        _list(source, eligibility, journal, parameters, pages)
    return pages


def _list(
    source: Source,
    eligibility: Eligibility,
    journal: Path,
    parameters: Mapping[str, Any],
    pages: list[ListedPage],
) -> None:
    """Add the source's pages that follow to `pages` and to the journal."""
    seen = sum(len(page.entries) + sum(page.left_out.values()) for page in pages)
    with (
        journal.open("a" if pages else "w", encoding="utf-8") as file,
        tqdm(initial=seen, desc="listing", unit=" images", mininterval=5.0) as bar,
    ):
        if not pages:
            file.write(json.dumps({"parameters": parameters}) + "\n")
        for page in source.pages(pages[-1].cursor if pages else None):
            judged = [eligibility.judge(record, source=source.name) for record in page.records]
            entries = [entry for entry in judged if isinstance(entry, CatalogueEntry)]
            left_out = Counter(cause for cause in judged if isinstance(cause, LeftOut))
            pages.append(ListedPage(entries, dict(left_out), page.cursor))
            file.write(_LINE.dump_json(pages[-1]).decode() + "\n")
            file.flush()
            bar.total = page.total or bar.total
            bar.update(len(page.records))


def _read_listing(journal: Path, parameters: Mapping[str, Any]) -> list[ListedPage]:
    """What the journal has, if it is of the same parameters and ends where a page begins; else nothing."""
    if not journal.is_file():
        return []
    written = journal.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(journal, len(whole))
    lines = whole.splitlines()
    try:
        if not lines or json.loads(lines[0])["parameters"] != parameters:
            return []
        pages = [_LINE.validate_json(line) for line in lines[1:]]
    except (ValueError, KeyError, TypeError):
        return []
    return pages if pages and pages[-1].cursor else []


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

    def is_same(image: StoredImage) -> bool:
        try:
            data = (output / image_path(image.isic_id)).read_bytes()
        except OSError:
            return False
        return len(data) == image.bytes and hashlib.sha256(data).hexdigest() == image.sha256

    pool = ThreadPoolExecutor(threads)
    try:
        same = pool.map(is_same, noted)
        return {image.isic_id: image for image, kept in zip(noted, same, strict=True) if kept}
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


def _write_failures(file: Path, failed: Mapping[str, ImageFailure]) -> None:
    if not failed:
        file.unlink(missing_ok=True)
        return
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["isic_id", "cause", "message"])
        writer.writerows([isic_id, error.cause, str(error)] for isic_id, error in sorted(failed.items()))


def summary(outcome: Outcome) -> list[str]:
    """What a person reads at the end, a line each."""
    plan, entries = outcome.plan, outcome.entries
    wanted = Counter(entry.diagnosis for entry in plan.entries)
    licences = Counter(entry.copyright_license for entry in entries)
    lines = [
        f"{len(entries):,} of {len(plan.entries):,} images are here, {outcome.fetched:,} fetched now",
        "by diagnosis: " + ", ".join(f"{diagnosis} {count:,}" for diagnosis, count in wanted.items()),
        "by licence: " + ", ".join(f"{licence} {count:,}" for licence, count in licences.items()),
        f"chosen from {plan.candidates:,} candidates; left out:",
        *(f"  {count:>9,} {cause}" for cause, count in plan.left_out.items()),
    ]
    if outcome.failures:
        lines.append(f"{len(outcome.failures):,} failed, see {FAILURES}; run this again to try them again")
    return lines

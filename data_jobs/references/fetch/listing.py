"""Going through all images of a source, and going on where an interrupted run was.

`listing.jsonl`, one line a page: the entries of the images that are candidates, how many of the others were left
out for which cause, and where the next page begins. A torn last line counts as not written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_jobs.references.catalogue import CatalogueEntry
from data_jobs.references.fetch.eligibility import Eligibility, LeftOut
from data_jobs.references.fetch.http import Refused
from data_jobs.references.fetch.sources import Page, Source
from serve_app.domain.diagnosis import Diagnosis

JOURNAL = "listing.jsonl"


@dataclass(slots=True)
class Listing:
    """The candidates among a source's images, and how many were left out for which cause."""

    candidates: list[CatalogueEntry] = field(default_factory=list)
    left_out: Counter[LeftOut] = field(default_factory=Counter)
    cursor: str | None = None

    @property
    def seen(self) -> int:
        """Images looked at."""
        return len(self.candidates) + self.left_out.total()


def list_candidates(
    source: Source,
    eligibility: Eligibility,
    output: Path,
    *,
    parameters: dict[str, Any],
) -> Listing:
    """Go through a source's pages, or through those after the last one that the journal has."""
    journal = output / JOURNAL
    listing = _read(journal, parameters)
    try:
        _extend(listing, source, eligibility, journal, parameters)
    except Refused:
        if listing.cursor is None:
            raise
        # The archive knows the old cursor no more.
        listing = Listing()
        _extend(listing, source, eligibility, journal, parameters)
    return listing


def _extend(
    listing: Listing,
    source: Source,
    eligibility: Eligibility,
    journal: Path,
    parameters: dict[str, Any],
) -> None:
    with (
        journal.open("a" if listing.cursor else "w", encoding="utf-8") as file,
        tqdm(initial=listing.seen, desc="listing", unit=" images", mininterval=5.0) as bar,
    ):
        if listing.cursor is None:
            file.write(json.dumps({"parameters": parameters}) + "\n")
        for page in source.pages(listing.cursor):
            entries, left_out = _judge(page, source, eligibility)
            line = {
                "entries": [asdict(entry) for entry in entries],
                "left_out": left_out,
                "cursor": page.cursor,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            _add(listing, entries, left_out, page.cursor)
            bar.total = page.total or bar.total
            bar.update(len(page.records))


def _judge(
    page: Page, source: Source, eligibility: Eligibility
) -> tuple[list[CatalogueEntry], Counter[LeftOut]]:
    entries: list[CatalogueEntry] = []
    left_out: Counter[LeftOut] = Counter()
    for record in page.records:
        judged = eligibility.judge(record, source=source.name)
        if isinstance(judged, LeftOut):
            left_out[judged] += 1
        else:
            entries.append(judged)
    return entries, left_out


def _add(
    listing: Listing, entries: list[CatalogueEntry], left_out: Counter[LeftOut], cursor: str | None
) -> None:
    listing.candidates += entries
    listing.left_out += left_out
    listing.cursor = cursor


def _read(journal: Path, parameters: dict[str, Any]) -> Listing:
    """What the journal has, if it is of the same parameters and ends where a page begins; else nothing."""
    listing = Listing()
    if not journal.is_file():
        return listing
    written = journal.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    os.truncate(journal, len(whole))
    lines = whole.splitlines()
    try:
        if not lines or json.loads(lines[0])["parameters"] != parameters:
            return Listing()
        for line in lines[1:]:
            page = json.loads(line)
            entries = [
                CatalogueEntry(**{**entry, "diagnosis": Diagnosis(entry["diagnosis"])})
                for entry in page["entries"]
            ]
            left_out = Counter({LeftOut(cause): count for cause, count in page["left_out"].items()})
            _add(listing, entries, left_out, page["cursor"])
    except (ValueError, KeyError, TypeError):
        return Listing()
    return listing if listing.cursor else Listing()

"""The fetch from end to end: list, choose, check the disk, fetch, describe.

What a folder is to hold is chosen once, so that running again fetches what is missing and nothing else:
`selection.parquet` has the chosen entries, `selection.json` what they were chosen by and from. The latter is
written last: while it is not there, nothing has been chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
import csv
from dataclasses import dataclass, field, replace
import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any

from data_jobs.references.catalogue import (
    IMAGES,
    CatalogueEntry,
    read_entries,
    write_catalogue,
    write_entries,
)
from data_jobs.references.fetch.download import Download, check_space, stored_images
from data_jobs.references.fetch.eligibility import Eligibility
from data_jobs.references.fetch.http import FetchError, Pace
from data_jobs.references.fetch.listing import JOURNAL, list_candidates
from data_jobs.references.fetch.selection import choose
from data_jobs.references.fetch.sources import Source
from serve_app.domain.errors import Conflict

ENTRIES = "selection.parquet"
PARAMETERS = "selection.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """The chosen entries; `candidates` they were chosen from, `left_out` images were none, by cause."""

    entries: list[CatalogueEntry]
    candidates: int
    left_out: Mapping[str, int]


def read_plan(output: Path, parameters: Mapping[str, Any]) -> Plan | None:
    """Read the folder's plan, None when it has none. Raises Conflict when it was made with other parameters."""
    file = output / PARAMETERS
    if not file.is_file():
        return None
    written = json.loads(file.read_text(encoding="utf-8"))
    before = written["parameters"]
    if before != parameters:
        changed = sorted(name for name in {*before, *parameters} if before.get(name) != parameters.get(name))
        told = "; ".join(f"{name} was {before.get(name)}, is {parameters.get(name)}" for name in changed)
        raise Conflict(f"{output} was begun with other options ({told}). Name another --output.")
    return Plan(read_entries(output / ENTRIES), written["candidates"], written["left_out"])


def write_plan(output: Path, parameters: Mapping[str, Any], plan: Plan) -> None:
    """Write the folder's plan."""
    write_entries(output / ENTRIES, plan.entries)
    text = json.dumps(
        {"parameters": parameters, "candidates": plan.candidates, "left_out": plan.left_out}, indent=2
    )
    partial = output / f"{PARAMETERS}.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(output / PARAMETERS)


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Keep other fetches out of the folder. Raises Conflict when one is at work there."""
    with (output / "fetch.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"Another fetch is at work in {output}.") from error
        yield


FAILURES = "failures.csv"


@dataclass(frozen=True, slots=True)
class Selection:
    """How many images are wanted, and how they are chosen (see `selection`)."""

    count: int
    seed: int = 0
    minimum: int | None = None
    several_per_lesion: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fetch left: the images that are whole, and why others are missing, by isic_id."""

    plan: Plan
    entries: list[CatalogueEntry]
    fetched: int
    failures: dict[str, str] = field(default_factory=dict)


def fetch(
    source: Source,
    output: Path,
    selection: Selection,
    eligibility: Eligibility,
    pace: Pace,
    *,
    threads: int = 8,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Make `output` a folder of reference images, or finish what an earlier run began there.

    Raises FetchError when the source does not answer or the disk is full, Conflict when the folder is another
    fetch's. An image that can not be had does not stop it: it is in `failures.csv` with its cause.
    """
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    with only_one(output):
        parameters = _parameters(source, selection, eligibility)
        plan = read_plan(output, parameters) or _plan(source, output, selection, eligibility, parameters)
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
        _write_failures(output, download)
        write_catalogue(output, entries)
        failures = {isic_id: str(error) for isic_id, error in download.failed.items()}
        return Outcome(plan, entries, len(download.stored), failures)


def _plan(
    source: Source,
    output: Path,
    selection: Selection,
    eligibility: Eligibility,
    parameters: dict[str, Any],
) -> Plan:
    listing = list_candidates(source, eligibility, output, parameters=parameters)
    chosen = choose(
        listing.candidates,
        selection.count,
        seed=selection.seed,
        minimum=selection.minimum,
        several_per_lesion=selection.several_per_lesion,
    )
    if not chosen:
        causes = ", ".join(f"{cause}: {count:,}" for cause, count in listing.left_out.most_common())
        raise FetchError(
            f"None of {listing.seen:,} images can be a reference ({causes or 'there are none'})."
        )
    left_out = {cause.value: count for cause, count in listing.left_out.most_common()}
    plan = Plan(chosen, len(listing.candidates), left_out)
    write_plan(output, parameters, plan)
    (output / JOURNAL).unlink()
    return plan


def _parameters(source: Source, selection: Selection, eligibility: Eligibility) -> dict[str, Any]:
    excluded = "\n".join(sorted(eligibility.excluded)).encode()
    return {
        "source": source.name,
        **source.parameters(),
        "count": selection.count,
        "seed": selection.seed,
        "minimum": selection.minimum,
        "several_per_lesion": selection.several_per_lesion,
        "licence": sorted(eligibility.licences),
        "unconfirmed": eligibility.unconfirmed,
        "excluded": hashlib.sha256(excluded).hexdigest() if eligibility.excluded else None,
    }


def _write_failures(output: Path, download: Download) -> None:
    file = output / FAILURES
    if not download.failed:
        file.unlink(missing_ok=True)
        return
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["isic_id", "cause", "message"])
        writer.writerows(
            [isic_id, error.cause, str(error)] for isic_id, error in sorted(download.failed.items())
        )


def summary(outcome: Outcome) -> list[str]:
    """What a person reads at the end, a line each."""
    plan, entries = outcome.plan, outcome.entries
    lines = [f"{len(entries):,} of {len(plan.entries):,} images are here, {outcome.fetched:,} fetched now"]
    wanted = Counter(entry.diagnosis for entry in plan.entries)
    lines.append(
        "by diagnosis: " + ", ".join(f"{diagnosis} {count:,}" for diagnosis, count in wanted.items())
    )
    licences = Counter(entry.copyright_license for entry in entries)
    lines.append("by licence: " + ", ".join(f"{licence} {count:,}" for licence, count in licences.items()))
    lines.append(f"chosen from {plan.candidates:,} candidates; left out:")
    lines += [f"  {count:>9,} {cause}" for cause, count in plan.left_out.items()]
    if outcome.failures:
        lines.append(f"{len(outcome.failures):,} failed, see {FAILURES}; run this again to try them again")
    return lines

"""What a folder is to hold: chosen once, so that running again fetches what is missing and nothing else.

`selection.parquet` has the chosen entries, `selection.json` what they were chosen by and from. The latter is
written last: while it is not there, nothing has been chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
import fcntl
import json
from pathlib import Path
from typing import Any

from data_jobs.references.catalogue import CatalogueEntry, read_entries, write_entries
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

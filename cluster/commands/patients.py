"""`derm-cds patients load`: the directory of patients of a node that has no PMS to ask."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from dataclasses import fields
from datetime import date
from pathlib import Path
import sys

from cluster.database import database
from serve_app.domain.errors import InvalidField
from serve_app.domain.patient import History, Sex
from serve_app.domain.strict_json import read_json
from serve_app.records.patients import PatientEntry, PatientTable
from serve_app.records.pool import open_pool

_KEYS = {"patient_id", "birth_date", "sex", "history", "encounters"}


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `patients`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    load = actions.add_parser("load", help="write patients from a file over what is known of them")
    load.add_argument("file", type=Path, help="one JSON object a line (docs/pms.md)")
    load.set_defaults(run=_load)


def _load(arguments: argparse.Namespace) -> int:
    # All of it first: a mistake in the last line must not leave half a file loaded.
    entries = list(read_entries(arguments.file))
    with database(arguments.home) as urls:
        asyncio.run(_write(urls.owner, entries))
    sys.stdout.write(f"{len(entries)} patients loaded\n")
    return 0


def read_entries(file: Path) -> Iterator[PatientEntry]:
    """Read patients; InvalidField names the line, and quotes nothing of it."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _entry(read_json(line))
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise InvalidField(f"{file}, line {number}: not a patient; see docs/pms.md.") from None


def _entry(value: dict[str, object]) -> PatientEntry:
    patient_id, birth_date, sex = value["patient_id"], value.get("birth_date"), value.get("sex")
    history, encounters = value.get("history") or {}, value.get("encounters") or []
    if set(value) - _KEYS or not isinstance(patient_id, str) or not isinstance(history, dict):
        raise ValueError
    if not isinstance(encounters, list) or not all(isinstance(each, str) for each in encounters):
        raise ValueError
    if any(answer is not None and not isinstance(answer, bool) for answer in history.values()):
        raise ValueError
    if set(history) - {field.name for field in fields(History)}:
        raise ValueError
    return PatientEntry(
        patient_id=patient_id,
        birth_date=None if birth_date is None else date.fromisoformat(str(birth_date)),
        sex=None if sex is None else Sex(str(sex)),
        history=History(**history),
        encounters=encounters,
    )


async def _write(dsn: str, entries: list[PatientEntry]) -> None:
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=30)
    try:
        await PatientTable(pool).load(entries)
    finally:
        await pool.close()

"""`derm-cds outbox`: what the PMS has not been told of; `derm-cds patients load`: the directory of a node without one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from datetime import date
from pathlib import Path
from uuid import UUID, uuid4

from cluster.commands import actions_of
from cluster.commands.records import ask, ask_as_owner
from serve_app.audit.events import os_account
from serve_app.domain.errors import InvalidField, NotFound
from serve_app.domain.patient import History, Sex
from serve_app.domain.strict_json import read_json
from serve_app.records.outbox import Outbox, UndeliveredMessage
from serve_app.records.patients import PatientEntry, PatientTable

_KEYS = {"patient_id", "birth_date", "sex", "history", "encounters"}


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `outbox` or `patients`."""
    action = actions_of(parser)
    if name == "patients":
        load = action("load", _load, "write patients from a file over what is known of them")
        load.add_argument("file", type=Path, help="one JSON object a line (docs/pms.md)")
        return
    action("status", _status, "count what waits and what is dead; exit code 1 if any is dead")
    listed = action("list", _list, "list what was not delivered, oldest first")
    listed.add_argument("--dead", action="store_true", help="only what was given up")
    listed.add_argument("--limit", type=int, default=100, help="how many at most (default: %(default)s)")
    retry = action("retry", _retry, "have messages sent at once, with their whole time again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("message", type=UUID, nargs="?", help="id of one message")
    which.add_argument("--dead", action="store_true", help="all that were given up")


def _status(arguments: argparse.Namespace) -> int:
    counts = ask(arguments.home, lambda pool: Outbox(pool).counts())
    oldest = "" if counts.oldest_waiting_s is None else f", the oldest for {counts.oldest_waiting_s:.0f} s"
    held = f" ({counts.unconfirmed} held: their encounter is not confirmed)" if counts.unconfirmed else ""
    wrong = (
        f", {counts.wrong_encounter} of them under another patient's encounter"
        if counts.wrong_encounter
        else ""
    )
    print(f"{counts.waiting} wait{held}{oldest}; {counts.dead} dead{wrong}")
    return 1 if counts.dead else 0


def _list(arguments: argparse.Namespace) -> None:
    dead_only, limit = arguments.dead, arguments.limit
    found = ask(arguments.home, lambda pool: Outbox(pool).list(dead_only=dead_only, limit=limit))
    print("\n".join(map(_describe, found)) or "nothing")


def _describe(message: UndeliveredMessage) -> str:
    state = "dead" if message.dead_at else f"waits until {message.due_at.isoformat(timespec='seconds')}"
    if message.sent_at is None and message.attempts:
        state += ", its encounter not confirmed"
    about = (
        f"encounter {message.encounter_id}, assessment {message.assessment_id}"
        if message.encounter_id
        else "no encounter"
    )
    return (
        f"{message.message_id} {message.kind}, {about}: {state}; "
        f"queued {message.queued_at.isoformat(timespec='seconds')}, {message.attempts} attempts, "
        f"last error {message.last_error or 'none'}"
    )


def _retry(arguments: argparse.Namespace) -> None:
    wanted, by = arguments.message, {"actor": os_account(), "request_id": str(uuid4())}
    revived = ask(arguments.home, lambda pool: Outbox(pool).retry(wanted, **by))
    if wanted is not None and not revived:
        raise NotFound("No message of that id waits or is dead: `derm-cds outbox list` names them.")
    print(f"{revived} will be sent at once")


def _load(arguments: argparse.Namespace) -> None:
    # All of it first: a mistake in the last line must not leave half a file loaded.
    entries = list(_read_entries(arguments.file))
    ask_as_owner(arguments.home, lambda pool: PatientTable(pool).load(entries))
    print(f"{len(entries)} patients loaded")


def _read_entries(file: Path) -> Iterator[PatientEntry]:
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

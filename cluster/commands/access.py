"""`derm-cds access` and `derm-cds assign`: who cares for whom, and who is locked out."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
import sys
from typing import TypeVar

from cluster.database import database
from serve_app.audit.events import AuditEvent, account_event, os_account
from serve_app.domain.errors import InvalidField, NotFound
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.records.access import AccessStore, RevocationKind
from serve_app.records.pool import open_pool

#: How times are given, for help and refusals.
TIME = "RFC 3339 time with a zone (2026-12-01T08:00:00Z, 2026-12-01T09:00:00+01:00)"

_Result = TypeVar("_Result")


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `access`, or `assign`, its most frequent action, by its own name."""
    if name == "assign":
        _define_assign(parser)
        return
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    purposes = {
        "assign": "put a patient into somebody's care",
        "end": "end somebody's care for a patient now",
        "list": "list care assignments and who is locked out",
        "revoke": "refuse a subject, or one token, from the next request on",
        "restore": "let a subject, or one token, in again",
    }
    made = {
        action: actions.add_parser(action, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        for action, purpose in purposes.items()
    }
    _define_assign(made["assign"])
    _define_pair(made["end"], required=True)
    made["end"].set_defaults(run=_end)
    _define_pair(made["list"], required=False)
    made["list"].add_argument("--all", action="store_true", help="assignments that have ended, too")
    made["list"].set_defaults(run=_list)
    for action, run in (("revoke", _revoke), ("restore", _restore)):
        whom = made[action].add_mutually_exclusive_group(required=True)
        whom.add_argument("subject", nargs="?", help="`sub` of the tokens")
        whom.add_argument("--token", metavar="JTI", help="`jti` of the one token")
        made[action].set_defaults(run=run)


def _define_assign(parser: argparse.ArgumentParser) -> None:
    _define_pair(parser, required=True, patient=patient_id)
    parser.add_argument("--from", dest="since", type=instant, help=f"{TIME} the care begins (default: now)")
    parser.add_argument("--until", type=instant, help=f"{TIME} the care ends (default: open)")
    parser.set_defaults(run=_assign)


def _define_pair(
    parser: argparse.ArgumentParser, *, required: bool, patient: Callable[[str], str] = str
) -> None:
    parser.add_argument("--patient", type=patient, required=required, help="the PMS's id of the patient")
    parser.add_argument("--clinician", required=required, help="`sub` of the principal's tokens")


def _assign(arguments: argparse.Namespace) -> int:
    patient, clinician = arguments.patient, arguments.clinician
    event = _event("assign", patient_id=patient, subject=clinician)
    _ask(
        arguments.home,
        lambda store: store.assign(
            patient,
            clinician,
            starts_at=arguments.since or datetime.now(UTC),
            ends_at=arguments.until,
            event=event,
        ),
    )
    since = f"from {arguments.since.isoformat()} " if arguments.since else ""
    until = f"until {arguments.until.isoformat()}" if arguments.until else "until further notice"
    sys.stdout.write(f"{patient} is in the care of {clinician} {since}{until}\n")
    return 0


def _end(arguments: argparse.Namespace) -> int:
    patient, clinician = arguments.patient, arguments.clinician
    event = _event("end_assignment", patient_id=patient, subject=clinician)
    ended = _ask(arguments.home, lambda store: store.end_assignment(patient, clinician, event=event))
    if not ended:
        raise NotFound(f"{patient} is not in the care of {clinician}, now or later.")
    sys.stdout.write(f"{patient} is no longer in the care of {clinician}\n")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    assignments = _ask(
        arguments.home,
        lambda store: store.assignments(
            patient_id=arguments.patient, clinician=arguments.clinician, ended_too=arguments.all
        ),
    )
    for care in assignments:
        until = _utc(care.ends_at) if care.ends_at else "further notice"
        since = _utc(care.starts_at)
        sys.stdout.write(f"{care.patient_id}: {care.clinician}, from {since} until {until}\n")
    for lock in _ask(arguments.home, lambda store: store.revocations()):
        at = _utc(lock.revoked_at)
        sys.stdout.write(f"revoked {lock.kind} {lock.value}: by {lock.revoked_by} at {at}\n")
    return 0


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _revoke(arguments: argparse.Namespace) -> int:
    kind, value = _whom(arguments)
    event = _event("revoke", **{kind: value})
    done = _ask(arguments.home, lambda store: store.revoke(kind, value, by=os_account(), event=event))
    sys.stdout.write(f"{kind} {value} is refused{' from now on' if done else ' already'}\n")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    kind, value = _whom(arguments)
    event = _event("restore", **{kind: value})
    if not _ask(arguments.home, lambda store: store.restore(kind, value, event=event)):
        raise NotFound(f"The {kind} {value} is not revoked.")
    sys.stdout.write(f"{kind} {value} is let in again\n")
    return 0


def _whom(arguments: argparse.Namespace) -> tuple[RevocationKind, str]:
    return ("token", arguments.token) if arguments.token else ("subject", arguments.subject)


def _event(action: str, *, patient_id: str | None = None, **detail: str) -> AuditEvent:
    return account_event(action, detail, patient_id=patient_id)


def _ask(home: Path, ask: Callable[[AccessStore], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(AccessStore(pool))
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.owner))


def patient_id(text: str) -> str:
    """Read an argument that is a patient's id: only one that the interface takes, too."""
    try:
        return parse_opaque_id("patient", text)
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def instant(text: str) -> datetime:
    """Read an argument that is a time, in UTC: one without a zone could be either."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no {TIME}")

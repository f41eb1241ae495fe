"""`derm-cds access` and `derm-cds assign`: who cares for whom, who went in without, and who is locked out."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from cluster.commands import actions_of
from cluster.commands.records import ask_as_owner
from serve_app.access.tokens import check_subject
from serve_app.audit.events import account_event, os_account
from serve_app.domain.errors import Conflict, InvalidField, NotFound, SubjectRefused
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.records.access import AccessStore, CareAssignment, EmergencyAccess, RevocationKind

#: How times are given, for help and refusals.
TIME = "RFC 3339 time with a zone (2026-12-01T08:00:00Z, 2026-12-01T09:00:00+01:00)"

_Result = TypeVar("_Result")


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `access`, or `assign`, its most frequent action, by its own name."""
    if name == "assign":
        parser.set_defaults(run=_assign)
        _define_assign(parser)
        return
    action = actions_of(parser)
    _define_assign(action("assign", _assign, "put a patient into somebody's care"))
    _define_pair(action("end", _end, "end somebody's care for a patient now"), required=True)
    ending = action("end-emergency", _end_emergency, "end an emergency access now")
    ending.add_argument("emergency", type=UUID, help="its id (`derm-cds access list`)")
    listed = action("list", _list, "list care assignments, emergency accesses, and who is locked out")
    _define_pair(listed, required=False)
    listed.add_argument("--all", action="store_true", help="what has ended, too")
    for made, read in (
        # A slip of the keyboard must not read as if somebody were locked out.
        (action("revoke", _revoke, "refuse a subject, or one token, from the next request on"), subject),
        (action("restore", _restore, "let a subject, or one token, in again"), str),
    ):
        whom = made.add_mutually_exclusive_group(required=True)
        whom.add_argument("subject", nargs="?", type=read, help="`sub` of the tokens")
        whom.add_argument("--token", metavar="JTI", help="`jti` of the one token")


def _define_assign(parser: argparse.ArgumentParser) -> None:
    _define_pair(parser, required=True, patient=patient_id, clinician=subject)
    parser.add_argument("--from", dest="since", type=instant, help=f"{TIME} the care begins (default: now)")
    parser.add_argument("--until", type=instant, help=f"{TIME} the care ends (default: open)")


def _define_pair(
    parser: argparse.ArgumentParser,
    *,
    required: bool,
    patient: Callable[[str], str] = str,
    clinician: Callable[[str], str] = str,
) -> None:
    parser.add_argument("--patient", type=patient, required=required, help="the PMS's id of the patient")
    parser.add_argument(
        "--clinician", type=clinician, required=required, help="`sub` of the principal's tokens"
    )


def _assign(arguments: argparse.Namespace) -> None:
    patient, clinician = arguments.patient, arguments.clinician
    since, until = arguments.since, arguments.until
    event = account_event("assign", {"subject": clinician}, patient_id=patient)
    starts_at = since or datetime.now(UTC)
    if until and until <= starts_at:
        begins = since.isoformat() if since else f"now, {_utc(starts_at)}"
        raise Conflict(f"--until {until.isoformat()} is not after --from {begins}.")
    _ask(
        arguments,
        lambda store: store.assign(CareAssignment(patient, clinician, starts_at, until), event=event),
    )
    begin = f"from {since.isoformat()} " if since else ""
    end = f"until {until.isoformat()}" if until else "until further notice"
    print(f"{patient} is in the care of {clinician} {begin}{end}")


def _end(arguments: argparse.Namespace) -> None:
    patient, clinician = arguments.patient, arguments.clinician
    event = account_event("end_assignment", {"subject": clinician}, patient_id=patient)
    if not _ask(arguments, lambda store: store.end_assignment(patient, clinician, event=event)):
        raise NotFound(f"{patient} is not in the care of {clinician}, now or later.")
    print(f"{patient} is no longer in the care of {clinician}")


def _end_emergency(arguments: argparse.Namespace) -> None:
    emergency_id = arguments.emergency

    async def end(store: AccessStore) -> EmergencyAccess:
        found = await store.emergency(emergency_id)
        if found is None:
            raise NotFound(f"There is no emergency access {emergency_id}.")
        detail = {"emergency_id": str(emergency_id), "subject": found.principal}
        event = account_event("end_emergency", detail, patient_id=found.patient_id)
        if not await store.end_emergency(emergency_id, by=os_account(), event=event):
            raise NotFound(f"The emergency access {emergency_id} is over already.")
        return found

    ended = _ask(arguments, end)
    print(f"{ended.principal} has no emergency access {emergency_id} to {ended.patient_id} any more")


def _list(arguments: argparse.Namespace) -> None:
    wanted = {"patient_id": arguments.patient, "clinician": arguments.clinician, "ended_too": arguments.all}
    for care in _ask(arguments, lambda store: store.assignments(**wanted)):
        until = _utc(care.ends_at) if care.ends_at else "further notice"
        print(f"{care.patient_id}: {care.clinician}, from {_utc(care.starts_at)} until {until}")
    wanted["principal"] = wanted.pop("clinician")
    for opened in _ask(arguments, lambda store: store.open_emergencies(**wanted)):
        until = f"until {_utc(opened.ends_at)}"
        if opened.ended_at:
            until = f"ended by {opened.ended_by} at {_utc(opened.ended_at)}"
        begun = f"from {_utc(opened.starts_at)}"
        print(f"emergency {opened.emergency_id}: {opened.patient_id}: {opened.principal}, {begun} {until}")
    for lock in _ask(arguments, lambda store: store.revocations()):
        print(f"revoked {lock.kind} {lock.value}: by {lock.revoked_by} at {_utc(lock.revoked_at)}")


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def _revoke(arguments: argparse.Namespace) -> None:
    kind, value = _whom(arguments)
    event = account_event("revoke", {kind: value})
    done = _ask(arguments, lambda store: store.revoke(kind, value, by=os_account(), event=event))
    print(f"{kind} {value} is refused{' from now on' if done else ' already'}")


def _restore(arguments: argparse.Namespace) -> None:
    kind, value = _whom(arguments)
    event = account_event("restore", {kind: value})
    if not _ask(arguments, lambda store: store.restore(kind, value, event=event)):
        raise NotFound(f"The {kind} {value} is not revoked.")
    print(f"{kind} {value} is let in again")


def _whom(arguments: argparse.Namespace) -> tuple[RevocationKind, str]:
    return ("token", arguments.token) if arguments.token else ("subject", arguments.subject)


def _ask(arguments: argparse.Namespace, question: Callable[[AccessStore], Awaitable[_Result]]) -> _Result:
    return ask_as_owner(arguments.home, lambda pool: question(AccessStore(pool)))


def patient_id(text: str) -> str:
    """Read an argument that is a patient's id: only one that the interface takes, too."""
    try:
        return parse_opaque_id("patient", text)
    except InvalidField as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def subject(text: str) -> str:
    """Read an argument that is a token's subject: only one that is let in, too."""
    try:
        return check_subject(text)
    except SubjectRefused as error:
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

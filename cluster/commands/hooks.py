"""`derm-cds hooks`: which clinician and which patient of ours an EHR means by its ids, for CDS Hooks (docs/pms.md)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from cluster.commands import actions_of
from cluster.commands.access import patient_id, subject
from cluster.commands.records import ask_as_owner
from serve_app.domain.errors import InvalidField, NotFound
from serve_app.domain.identifiers import is_fhir_id, is_fhir_user
from serve_app.domain.strict_json import read_json
from serve_app.records.hooks import HookStore, Identity, IdentityKind
from serve_app.settings import load_settings, read_hooks


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `hooks`."""
    action = actions_of(parser)
    mapped = action("map", _map, "have an EHR mean a clinician or a patient by an id of its own")
    _define_whom(mapped)
    ours = mapped.add_mutually_exclusive_group(required=True)
    ours.add_argument("--subject", type=subject, help="`sub` of the clinician's tokens")
    ours.add_argument("--patient-id", type=patient_id, help="the PMS's id of the patient")
    load = action("load", _load, "map all of a file, or nothing of it")
    load.add_argument("--client", required=True, help="the EHR, by its name in DERM_HOOKS_CLIENTS")
    load.add_argument("file", type=Path, help='{"user", "subject"} or {"patient", "patient_id"}, one a line')
    _define_whom(action("unmap", _unmap, "have an EHR mean nobody by an id, from the next request on"))
    listed = action("list", _list, "list whom EHRs mean")
    listed.add_argument("--client", help="one EHR only")


def _define_whom(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--client", required=True, help="the EHR, by its name in DERM_HOOKS_CLIENTS")
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("--user", type=_fhir_user, help="as the EHR names a user: Practitioner/123")
    whom.add_argument("--patient", type=_fhir_id, help="as the EHR names a patient: 123")


def _map(arguments: argparse.Namespace) -> None:
    if bool(arguments.user) != bool(arguments.subject):
        raise InvalidField("A user is a --subject, and a patient a --patient-id.")
    kind: IdentityKind = "user" if arguments.user else "patient"
    ours = arguments.subject or arguments.patient_id
    identity = Identity(_client(arguments), kind, arguments.user or arguments.patient, ours)
    ask_as_owner(arguments.home, lambda pool: HookStore(pool).map([identity]))
    print(f"{identity.client} means {identity.own_id} by {identity.fhir_id}")


def _load(arguments: argparse.Namespace) -> None:
    identities = list(_read(_client(arguments), arguments.file))
    made = ask_as_owner(arguments.home, lambda pool: HookStore(pool).map(identities))
    print(f"{made} mapped, {len(identities) - made} were before")


def _unmap(arguments: argparse.Namespace) -> None:
    kind: IdentityKind = "user" if arguments.user else "patient"
    fhir_id = arguments.user or arguments.patient
    ended = ask_as_owner(arguments.home, lambda pool: HookStore(pool).unmap(arguments.client, kind, fhir_id))
    if ended is None:
        raise NotFound(f"{arguments.client} means nobody by {fhir_id}.")
    print(f"{arguments.client} means nobody by {fhir_id} any more (it was {ended.own_id})")


def _list(arguments: argparse.Namespace) -> None:
    for each in ask_as_owner(arguments.home, lambda pool: HookStore(pool).identities(arguments.client)):
        since = f"{each.mapped_at:%Y-%m-%dT%H:%M:%SZ}"
        print(f"{each.client}: {each.kind} {each.fhir_id} is {each.own_id}, by {each.mapped_by} at {since}")


def _client(arguments: argparse.Namespace) -> str:
    """The EHR's name; InvalidField for one that is not configured: what is mapped for it would mean nothing."""
    file = load_settings().hooks_clients
    if file is None:
        raise InvalidField(
            "--client: DERM_HOOKS_CLIENTS is not set here; in secrets/service.env it is for every command."
        )
    if arguments.client not in read_hooks(file).clients:
        raise InvalidField(f"--client: DERM_HOOKS_CLIENTS has no client {arguments.client}.")
    name: str = arguments.client
    return name


def _read(client: str, file: Path) -> Iterator[Identity]:
    """Read identities; InvalidField names the line, and quotes nothing of it."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _identity(client, read_json(line))
                except (ValueError, TypeError, AttributeError, KeyError, argparse.ArgumentTypeError):
                    raise InvalidField(f"{file}, line {number}: no identity; see docs/pms.md.") from None


def _identity(client: str, value: dict[str, str]) -> Identity:
    if value.keys() == {"user", "subject"}:
        return Identity(client, "user", _fhir_user(value["user"]), subject(value["subject"]))
    if value.keys() == {"patient", "patient_id"}:
        return Identity(client, "patient", _fhir_id(value["patient"]), patient_id(value["patient_id"]))
    raise ValueError


def _fhir_user(text: str) -> str:
    """Read an argument that is a user of an EHR."""
    if not is_fhir_user(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of Practitioner/ID and its like")
    return text


def _fhir_id(text: str) -> str:
    """Read an argument that is a FHIR id."""
    if not is_fhir_id(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no id of FHIR")
    return text

"""`derm-cds audit`: whether the audit log is what was written, and a copy of it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import socket
import sys
from typing import TextIO, TypeVar

from cluster.database import database
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.fhir.audit_event import audit_event_resource
from serve_app.records.audit_chain import AuditChain, Seal
from serve_app.records.audit_events import events_between
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool
from serve_app.security.account import account_event
from serve_app.security.checkpoints import Checkpoint, CheckpointLog
from serve_app.settings import NodeFiles

_Result = TypeVar("_Result")


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `audit`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, run, purpose in (
        ("verify", _verify, "recompute the chain, and hold it against the signed checkpoints"),
        ("checkpoint", _checkpoint, "seal what is new, and sign the chain's state"),
    ):
        action = actions.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        action.set_defaults(run=run)
    export = actions.add_parser("export", help="write events as FHIR AuditEvent, a JSON object a line")
    export.add_argument("--from", dest="start", type=_instant, required=True, help="RFC 3339, inclusive")
    export.add_argument("--to", dest="end", type=_instant, required=True, help="RFC 3339, exclusive")
    export.add_argument("--out", type=Path, required=True, help="the file to make; it must not exist")
    export.set_defaults(run=_export)


def checkpoint_log(home: Path) -> CheckpointLog:
    """The checkpoints of a node."""
    files = NodeFiles(home)
    return CheckpointLog(files.audit_checkpoints, files.audit_signing_key)


def _verify(arguments: argparse.Namespace) -> int:
    known = checkpoint_log(arguments.home).read()
    seals = [Seal(checkpoint.position, checkpoint.hash) for checkpoint in known]
    found = _ask(arguments.home, lambda chain: chain.verify(seals))
    for finding in found.findings[:20]:
        at = f"seal {finding.position}" if finding.position else "no seal"
        event = f", event {finding.event_id}" if finding.event_id is not None else ""
        sys.stderr.write(f"{finding.kind}: {at}{event}\n")
    sys.stdout.write(
        f"{found.events} events, {len(known)} checkpoints; head {found.head.hash.hex()[:16]}: "
        f"{len(found.findings) or 'nothing'} found\n"
    )
    if found.findings:
        raise IntegrityError(
            "The audit log is not what was written: keep everything as it is, and investigate."
        )
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    async def seal(chain: AuditChain) -> Seal:
        while await chain.seal(wait=True):
            pass
        return await chain.head()

    head = _ask(arguments.home, seal)
    kept: Checkpoint = checkpoint_log(arguments.home).add(head.position, head.hash)
    sys.stdout.write(f"{kept.at.isoformat()} {kept.position} {kept.hash.hex()}\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Have it in the audit log first, then write: the export itself is among what it exports later."""
    if arguments.start >= arguments.end:
        raise Conflict("--from must be before --to.")
    detail = {"from": arguments.start.isoformat(), "to": arguments.end.isoformat()}
    event = account_event("export", detail)

    async def write(dsn: str) -> int:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            await LesionStore(pool).record_event(event)
            count = 0
            with _new_file(arguments.out) as file:
                async for found in events_between(pool, arguments.start, arguments.end):
                    resource = audit_event_resource(
                        found.event,
                        event_id=found.event_id,
                        recorded_at=found.recorded_at,
                        server=socket.gethostname(),
                    )
                    file.write(json.dumps(resource, separators=(",", ":")) + "\n")
                    count += 1
            return count
        finally:
            await pool.close()

    with database(arguments.home) as urls:
        count = asyncio.run(write(urls.app))
    sys.stdout.write(f"{count} events in {arguments.out}: it names patients, keep it as you keep them\n")
    return 0


def _new_file(path: Path) -> TextIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _ask(home: Path, ask: Callable[[AuditChain], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(AuditChain(pool))
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.app))

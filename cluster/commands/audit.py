"""`derm-cds audit`: whether the audit log is what was written, and a copy of it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import socket
import sys

from cluster.commands import actions_of
from cluster.commands.access import instant
from cluster.commands.records import ask, ask_database, record
from cluster.node_files import application_role, database
from cluster.running import running_service
from serve_app.audit.chain import Verification, describe, export_line, exported_events, follow, newest
from serve_app.audit.checkpoints import (
    Checkpoint,
    CheckpointLog,
    in_force,
    read_copy,
    read_public_key,
    write_public_key,
)
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.erasure.sweeping import pause
from serve_app.fhir.audit_event import audit_event_resource
from serve_app.records.audit_log import AuditChain, accept_restore, events_between, examine, sign_head
from serve_app.records.audit_schema import schema_findings
from serve_app.records.pool import Pool
from serve_app.records.reconciliation import Reconciliation, reconcile
from serve_app.settings import NodeFiles


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `audit`."""
    action = actions_of(parser)
    verify = action("verify", _verify, "recompute the chain, and hold it against the signed checkpoints")
    verify.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FILE",
        help="a copy of checkpoints that was kept elsewhere, as well",
    )
    verify.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="what checks them (PEM), instead of this node's own key",
    )
    elsewhere = verify.add_mutually_exclusive_group()
    elsewhere.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="verify this `export --sealed`: without a node or a database",
    )
    elsewhere.add_argument(
        "--database", metavar="URL", help="verify this database, a restored dump for one: without a node"
    )
    sign = action("checkpoint", _checkpoint, "seal what is new, and sign the chain's state")
    sign.add_argument(
        "--restored",
        action="store_true",
        help="the database was restored by other means than `restore`: what it holds now goes on from here",
    )
    action("public-key", _public_key, "print the key that checks the checkpoints, to be kept elsewhere")
    export = action("export", _export, "write events as FHIR AuditEvent, a JSON object a line")
    export.add_argument("--from", dest="start", type=_instant, help="RFC 3339, UTC without a zone; inclusive")
    export.add_argument("--to", dest="end", type=_instant, help="the same; exclusive")
    export.add_argument(
        "--sealed", action="store_true", help="instead, the whole log as it is sealed, for `verify --export`"
    )
    export.add_argument("--out", type=Path, required=True, help="the file to make; it must not exist")


def checkpoint_log(home: Path) -> CheckpointLog:
    """The checkpoints of a node."""
    files = NodeFiles(home)
    return CheckpointLog(files.audit_checkpoints, files.audit_signing_key)


def _verify(arguments: argparse.Namespace) -> None:
    elsewhere = arguments.export or arguments.database
    if elsewhere and not (arguments.checkpoints and arguments.public_key):
        raise Conflict(
            "--export and --database need --checkpoints and --public-key: a node's own are not read."
        )
    log = checkpoint_log(arguments.home)
    public = read_public_key(arguments.public_key) if arguments.public_key else None
    here = [] if elsewhere else log.read(public)
    known = here
    if arguments.checkpoints:
        both = dict.fromkeys([*read_copy(arguments.checkpoints, public or log.public_key()), *here])
        known = sorted(both, key=lambda checkpoint: checkpoint.at)
    found, rows = _look(arguments, known, kept_here=bool(here))
    for checkpoint in known:
        if checkpoint.restored_after is not None:
            print(
                f"restored, {checkpoint.at.isoformat(timespec='seconds')}: what was signed before holds up to "
                f"seal {checkpoint.restored_after}"
            )
    differences = rows.differences if rows else ()
    for line in (*map(describe, found.findings[:20]), *differences[:20]):
        print(line, file=sys.stderr)
    print(
        f"{found.head.position} events, {len(known)} checkpoints; head {found.head.hash.hex()[:16]}: "
        f"{len(found.findings) or 'nothing'} found"
    )
    last = newest(in_force(known))
    if unsigned := found.head.position - (last.position if last else 0):
        print(f"{unsigned} events are behind the last checkpoint: what it shows holds for those before")
    if rows:
        print(
            f"{rows.compared} rows beside the log, {rows.without_digest} of them from before it held digests: "
            f"{len(differences) or 'nothing'} found"
        )
    if found.findings or differences:
        what = "The audit log" if found.findings else "A row beside the audit log"
        raise IntegrityError(f"{what} is not what was written: keep everything as it is, and investigate.")


def _look(
    arguments: argparse.Namespace, known: Sequence[Checkpoint], *, kept_here: bool
) -> tuple[Verification, Reconciliation | None]:
    """Verify what is asked for, and hold the rows beside it against it where there are any."""
    signed = in_force(known)
    if arguments.export:
        return asyncio.run(follow(exported_events(arguments.export), signed)), None
    if arguments.database:
        return ask_database(arguments.database, lambda pool: _verify_copy(pool, signed))
    with database(arguments.home) as urls:
        at_rest = running_service(arguments.home) is None
        found = ask_database(
            urls.app,
            lambda pool: examine(AuditChain(pool), known, whole=True, kept_here=kept_here, at_rest=at_rest),
        )
        if waiting := ask_database(urls.app, lambda pool: AuditChain(pool).waiting()):
            when = (
                "until the service runs again, or `derm-cds audit checkpoint`"
                if at_rest
                else "for a moment yet"
            )
            print(f"{waiting} events have no seal {when}: nothing vouches for them")
        rows = ask_database(urls.app, reconcile)
        made = asyncio.run(schema_findings(urls.owner, application_role=application_role(urls)))
    return replace(found, findings=(*found.findings, *made)), rows


async def _verify_copy(pool: Pool, signed: Sequence[Checkpoint]) -> tuple[Verification, Reconciliation]:
    return await AuditChain(pool).verify(signed, is_copy=True), await reconcile(pool)


def _checkpoint(arguments: argparse.Namespace) -> None:
    log, restored = checkpoint_log(arguments.home), arguments.restored
    if restored:
        record(arguments.home, "restore", {"kind": "by other means"})
        pause(NodeFiles(arguments.home).retention_paused, "the database was restored by other means")
    kept = ask(arguments.home, lambda pool: sign(pool, log, restored=restored))
    print(log.line(kept) if kept else "nothing is sealed yet")


async def sign(pool: Pool, log: CheckpointLog, *, restored: bool) -> Checkpoint | None:
    """Seal what is new and sign it; `restored`: the log goes on from where the restored database ends."""
    chain = AuditChain(pool)
    while await chain.seal(wait=True):
        pass
    return await accept_restore(chain, log) if restored else await sign_head(chain, log)


def _public_key(arguments: argparse.Namespace) -> None:
    print(write_public_key(checkpoint_log(arguments.home).public_key()), end="")


def _export(arguments: argparse.Namespace) -> None:
    """Have it in the audit log first, then write: the export itself is among what it exports later."""
    start, end, sealed = arguments.start, arguments.end, arguments.sealed
    if [start, end].count(None) != (2 if sealed else 0):
        raise Conflict("Say --from and --to, or --sealed.")
    if not sealed and start >= end:
        raise Conflict(f"--to {end.isoformat()} is not after --from {start.isoformat()}.")
    span = {} if sealed else {"from": start.isoformat(), "to": end.isoformat()}
    record(arguments.home, "export", span or {"kind": "sealed"})

    async def write(pool: Pool) -> int:
        count = 0
        with os.fdopen(os.open(arguments.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            async for line in _sealed_lines(pool) if sealed else _resource_lines(pool, start, end):
                file.write(line)
                count += 1
        return count

    count = ask(arguments.home, write)
    print(f"{count} events in {arguments.out}: it names patients, keep it as you keep them")


async def _resource_lines(pool: Pool, start: datetime, end: datetime) -> AsyncIterator[bytes]:
    server = socket.gethostname()
    async for event_id, at, event in events_between(pool, start, end):
        resource = audit_event_resource(event, event_id=event_id, recorded_at=at, server=server)
        yield json.dumps(resource, separators=(",", ":")).encode() + b"\n"


async def _sealed_lines(pool: Pool) -> AsyncIterator[bytes]:
    chain = AuditChain(pool)
    while await chain.seal(wait=True):
        pass
    async for batch in chain.events():
        for sealed in batch:
            yield export_line(sealed)


def _instant(text: str) -> datetime:
    """Read a time as `instant` does, in UTC where it has no zone: what is exported is mostly whole days."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            return moment.replace(tzinfo=UTC)
    return instant(text)

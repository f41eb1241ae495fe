"""`derm-cds audit`: whether the audit log is what was written, and a copy of it."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import socket
import sys

from cluster.commands import actions_of
from cluster.commands.records import ask, record
from serve_app.audit.checkpoints import (
    Checkpoint,
    CheckpointLog,
    read_copy,
    read_public_key,
    write_public_key,
)
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.fhir.audit_event import audit_event_resource
from serve_app.records.audit_log import (
    AuditChain,
    Verification,
    accept_restore,
    describe,
    events_between,
    examine,
    sign_head,
)
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
    sign = action("checkpoint", _checkpoint, "seal what is new, and sign the chain's state")
    sign.add_argument(
        "--restored",
        action="store_true",
        help="the database was restored by other means than `restore`: what it holds now goes on from here",
    )
    action("public-key", _public_key, "print the key that checks the checkpoints, to be kept elsewhere")
    export = action("export", _export, "write events as FHIR AuditEvent, a JSON object a line")
    export.add_argument(
        "--from", dest="start", type=_instant, required=True, help="RFC 3339, UTC without a zone; inclusive"
    )
    export.add_argument("--to", dest="end", type=_instant, required=True, help="the same; exclusive")
    export.add_argument("--out", type=Path, required=True, help="the file to make; it must not exist")


def checkpoint_log(home: Path) -> CheckpointLog:
    """The checkpoints of a node."""
    files = NodeFiles(home)
    return CheckpointLog(files.audit_checkpoints, files.audit_signing_key)


def _verify(arguments: argparse.Namespace) -> None:
    log = checkpoint_log(arguments.home)
    public = read_public_key(arguments.public_key) if arguments.public_key else log.public_key()
    here = log.read(public)
    known = here
    if arguments.checkpoints:
        both = dict.fromkeys([*read_copy(arguments.checkpoints, public), *here])
        known = sorted(both, key=lambda checkpoint: checkpoint.at)

    async def look(pool: Pool) -> tuple[Verification, Reconciliation]:
        chain = AuditChain(pool)
        return await examine(chain, known, whole=True, kept_here=bool(here)), await reconcile(pool)

    found, rows = ask(arguments.home, look)
    for checkpoint in known:
        if checkpoint.restored_after is not None:
            print(
                f"restored, {checkpoint.at.isoformat(timespec='seconds')}: what was signed before holds up to "
                f"seal {checkpoint.restored_after}"
            )
    for line in (*map(describe, found.findings[:20]), *rows.differences[:20]):
        print(line, file=sys.stderr)
    print(
        f"{found.head.position} events, {len(known)} checkpoints; head {found.head.hash.hex()[:16]}: "
        f"{len(found.findings) or 'nothing'} found"
    )
    print(
        f"{rows.compared} rows beside the log, {rows.without_digest} of them from before it held digests: "
        f"{len(rows.differences) or 'nothing'} found"
    )
    if found.findings or rows.differences:
        what = "The audit log" if found.findings else "A row beside the audit log"
        raise IntegrityError(f"{what} is not what was written: keep everything as it is, and investigate.")


def _checkpoint(arguments: argparse.Namespace) -> None:
    log, restored = checkpoint_log(arguments.home), arguments.restored
    if restored:
        record(arguments.home, "restore", {"kind": "by other means"})
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
    start, end = arguments.start, arguments.end
    if start >= end:
        raise Conflict("--from must be before --to.")
    record(arguments.home, "export", {"from": start.isoformat(), "to": end.isoformat()})

    async def write(pool: Pool) -> int:
        count = 0
        with os.fdopen(os.open(arguments.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            async for event_id, at, event in events_between(pool, start, end):
                server = socket.gethostname()
                resource = audit_event_resource(event, event_id=event_id, recorded_at=at, server=server)
                file.write(json.dumps(resource, separators=(",", ":")) + "\n")
                count += 1
        return count

    count = ask(arguments.home, write)
    print(f"{count} events in {arguments.out}: it names patients, keep it as you keep them")


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)

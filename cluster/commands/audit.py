"""`derm-cds audit`: whether the audit log is what was written, and a copy of it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
import sys
from typing import TypeVar

from cluster.database import database
from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_chain import AuditChain, Seal
from serve_app.records.pool import open_pool
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


def _ask(home: Path, ask: Callable[[AuditChain], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(AuditChain(pool))
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.app))

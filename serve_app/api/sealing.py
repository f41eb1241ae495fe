"""Sealing the audit log's new events, moments after they were written, and checkpoints of it now and then."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic

from serve_app.records.audit_chain import GENESIS, AuditChain, Seal
from serve_app.security.checkpoints import CheckpointLog

EVERY_S = 2.0
CHECKPOINT_EVERY_S = 600.0
_BATCH = 1_000

_log = logging.getLogger("derm.audit")


async def seal_forever(chain: AuditChain, checkpoints: CheckpointLog) -> None:
    """Seal until cancelled. Every ingress replica runs this; one at a time seals, the others find nothing to do."""
    kept, next_checkpoint = Seal(0, GENESIS), monotonic() + CHECKPOINT_EVERY_S
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            while await chain.seal(limit=_BATCH) == _BATCH:
                pass
            if monotonic() >= next_checkpoint:
                kept = await keep_checkpoint(chain, checkpoints, after=kept)
                next_checkpoint = monotonic() + CHECKPOINT_EVERY_S
        except Exception as error:  # noqa: BLE001 - whatever fails now, the next round must come
            _log.warning("Sealing waits: %s", type(error).__name__)


async def keep_checkpoint(chain: AuditChain, checkpoints: CheckpointLog, *, after: Seal) -> Seal:
    """Sign the chain's head, unless nothing was sealed since `after`; returns the head."""
    head = await chain.head()
    if head != after:
        await asyncio.to_thread(checkpoints.add, head.position, head.hash)
    return head

"""The audit chain held against its signed checkpoints, and new ones signed only where it fits the old.

Whoever rules the database can write the chain anew from any place on. Were the result signed without a look at
what was signed before, the service itself would bear false witness.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta

from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_chain import AuditChain, Seal, Tampering, Verification
from serve_app.security.checkpoints import Checkpoint, CheckpointLog, in_force

#: A chain whose first seal is older has a checkpoint, unless somebody took it away: one is signed with the first seals.
FIRST_CHECKPOINT_WITHIN = timedelta(minutes=10)


async def examine(
    chain: AuditChain, checkpoints: Sequence[Checkpoint], *, whole: bool, kept_here: bool = True
) -> Verification:
    """Hold the chain against its checkpoints (oldest first): the `whole` of it, or what came after the last one.

    That there is no checkpoint at all is a finding, where the chain is older than its first one would be.
    `kept_here`: whether this node's own file has any.
    """
    known = [Seal(checkpoint.position, checkpoint.hash) for checkpoint in in_force(checkpoints)]
    last = max(known, key=lambda seal: seal.position, default=None)
    found = await chain.verify(known, since=None if whole else last)
    if (known and kept_here) or await chain.age() < FIRST_CHECKPOINT_WITHIN:
        return found
    gone = Tampering("the checkpoints are gone", 0, None)
    return Verification(found.events, found.head, (gone, *found.findings))


async def sign_head(chain: AuditChain, checkpoints: CheckpointLog) -> Checkpoint | None:
    """Sign the chain's head, and return the newest checkpoint; None while nothing is sealed.

    Nothing is signed where nothing was sealed since. IntegrityError, and nothing signed, when the chain does not
    follow from the last checkpoint, when two of them contradict each other, or when they are gone.
    """
    kept = await asyncio.to_thread(checkpoints.read)
    found = await examine(chain, kept, whole=False)
    if found.findings:
        raise IntegrityError(
            f"No checkpoint was signed: {describe(found.findings[0])}. `derm-cds audit verify` says more."
        )
    newest = next((each for each in reversed(kept) if each.position == found.head.position), None)
    if newest is not None or found.head.position == 0:
        return newest
    return await asyncio.to_thread(checkpoints.add, found.head.position, found.head.hash)


async def accept_restore(chain: AuditChain, checkpoints: CheckpointLog) -> Checkpoint:
    """Sign that the chain as it is now goes on from the last checkpoint it agrees with, and the later ones are void.

    For after a restore, and never by the service itself: the operator answers for it.
    """
    kept = sorted(in_force(await asyncio.to_thread(checkpoints.read)), key=lambda each: each.position)
    there = await chain.hashes_at([each.position for each in kept])
    agreed = 0
    for each in kept:
        if there.get(each.position) != each.hash:
            break
        agreed = each.position
    head = await chain.head()
    return await asyncio.to_thread(checkpoints.add, head.position, head.hash, restored_after=agreed)


def describe(finding: Tampering) -> str:
    """Say a finding in words: what, and where."""
    at = f"seal {finding.position}" if finding.position else "no seal"
    return f"{finding.kind}: {at}{'' if finding.event_id is None else f', event {finding.event_id}'}"

"""Completing what was left pending: a crash, a full queue or a lost database after T1."""

from __future__ import annotations

import asyncio
import logging
import random

from serve_app.api.live_model import LiveModelWatch
from serve_app.api.triage import Triage
from serve_app.domain.errors import IntegrityError, RejectedUpload
from serve_app.records.lesion_rows import PendingAssessment
from serve_app.records.lesions import LesionStore

logger = logging.getLogger("derm.recovery")

#: Longer than a request may take (triage.DEADLINE_S), so that no live request is overtaken.
ORPHANED_AFTER_S = 20.0
#: How long the first recovery may take before another replica tries; each further one has twice that.
LEASE_S = 30.0
#: Tries, over 7.5 minutes, before an image that cannot be assessed is given up: a limit that was set wrong,
#: or a key store that is being restored, must not end what was accepted.
FAILED_AFTER_TRIES = 5
_PERIOD_S = 5.0


async def recover_forever(records: LesionStore, triage: Triage, live: LiveModelWatch) -> None:
    """Look for pending assessments every few seconds, until cancelled.

    Every ingress replica runs this; claims skip locked rows and carry a lease, so each
    assessment is worked on once at a time, and T2's condition completes it exactly once.
    """
    while True:
        # Jittered, so that replicas do not ask in step.
        await asyncio.sleep(_PERIOD_S * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
        try:
            await recover_once(records, triage, live)
        except Exception as error:  # noqa: BLE001 - whatever fails now, the next round must come
            logger.warning("Recovery waits: %s", type(error).__name__)


async def recover_once(
    records: LesionStore,
    triage: Triage,
    live: LiveModelWatch,
    *,
    orphaned_after_s: float = ORPHANED_AFTER_S,
) -> int:
    """Complete what can be completed now; returns how many were."""
    completed = 0
    for pending in await records.claim_pending(older_than_s=orphaned_after_s, lease_s=LEASE_S, limit=4):
        try:
            completed += await _recover(triage, live, pending)
        except Exception as error:  # noqa: BLE001 - one that fails must not hold up the others
            logger.warning("Assessment %s stays pending: %s", pending.assessment_id, type(error).__name__)
    if completed:
        logger.warning("Completed %d pending assessments", completed)
    return completed


async def _recover(triage: Triage, live: LiveModelWatch, pending: PendingAssessment) -> bool:
    """Complete one, or end it as failed when it is the image itself that keeps it from an answer."""
    try:
        return await triage.resume(pending, await live.current()) is not None
    except (RejectedUpload, IntegrityError) as error:
        if pending.attempts < FAILED_AFTER_TRIES:
            raise
        if await triage.give_up(pending, error):
            logger.warning("Assessment %s has failed: %s", pending.assessment_id, error.code)
        return False

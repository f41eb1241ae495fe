"""Completing what was left pending: a crash, a full queue or a lost database after T1.

What cannot be completed ends, as `failed` and with a code, so that nobody waits for ever. Which failures say
something about the image, and which only that the service is in trouble, decides when:

- an image that is rejected or does not authenticate, after FAILED_AFTER_TRIES tries;
- any other failure, after FAILED_AFTER_SETBACKS tries that failed although another image was answered since the
  try before. Others answered is what tells a defect that this input meets from an outage: during an outage of
  minutes or days nothing is answered, so nothing counts, and nothing that was accepted ends. The leases between
  tries spread them over more than half an hour, so that a rolling update ends nothing either;
- never for what says that it is temporary: a full service, a database that does not answer, a key that another
  node's store may hold;
- whatever it was, after FAILED_AFTER: by then the clinician has long judged without it.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
import logging

from serve_app.domain.errors import (
    DataKeyMissing,
    DermError,
    IntegrityError,
    Overloaded,
    RecordsUnavailable,
    RejectedUpload,
    StageFailed,
)
from serve_app.lesions.live_model import LiveModelWatch
from serve_app.lesions.triage import Triage
from serve_app.records.lesion_rows import PendingAssessment
from serve_app.records.lesions import LesionStore

logger = logging.getLogger("derm.recovery")

#: How long one try may take, and how long the first one keeps others away; each further one has twice that.
ATTEMPT_S, LEASE_S = 20.0, 30.0
#: Tries, over 7.5 minutes, before an image that cannot be assessed is given up: a limit that was set wrong,
#: or a key store that is being restored, must not end what was accepted.
FAILED_AFTER_TRIES = 5
#: Tries that count before a failure that others do not share is the image's own: more than half an hour of them.
FAILED_AFTER_SETBACKS = 10
FAILED_AFTER = timedelta(days=7)
PERIOD_S = 5.0
#: Enough to catch up after an outage; what is left is the next round's.
_MOST_A_ROUND = 100


async def recover_once(records: LesionStore, triage: Triage, live: LiveModelWatch) -> int:
    """Complete what can be completed now; returns how many were.

    Every ingress replica does this every few seconds. Claims skip locked rows and carry a lease, one image at a time
    (what waits behind one that hangs is anybody's), and T2's condition completes each exactly once.
    """
    completed = 0
    for _ in range(_MOST_A_ROUND):
        claimed = await records.claim_pending(lease_s=LEASE_S, limit=1)
        if not claimed:
            break
        completed += await _recover(records, triage, live, claimed[0])
    if completed:
        logger.warning("Completed %d pending assessments", completed)
    return completed


async def _recover(
    records: LesionStore, triage: Triage, live: LiveModelWatch, pending: PendingAssessment
) -> bool:
    """Try one; what fails must not hold up the others."""
    try:
        async with asyncio.timeout(ATTEMPT_S):
            return await triage.resume(pending, await live.current()) is not None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is judged by what it keeps from an answer
        code = _code(error)
        logger.warning("Assessment %s stays pending: %s", pending.assessment_id, type(error).__name__)
        if await _ends(records, pending, error) and await triage.give_up(pending, code):
            logger.warning("Assessment %s has failed: %s", pending.assessment_id, code)
        return False


async def _ends(records: LesionStore, pending: PendingAssessment, error: Exception) -> bool:
    """Whether this failure ends the assessment; notes it against the assessment where it counts."""
    if isinstance(error, RejectedUpload | IntegrityError) and pending.attempts >= FAILED_AFTER_TRIES:
        return True
    if datetime.now(UTC) - pending.created_at >= FAILED_AFTER:
        return True
    if isinstance(error, Overloaded | RecordsUnavailable | DataKeyMissing):
        return False
    return await records.set_back(pending.assessment_id) >= FAILED_AFTER_SETBACKS


def _code(error: Exception) -> str:
    """The code that a caller reads; a deadline is a stage that did not answer, anything unforeseen a defect."""
    if isinstance(error, TimeoutError):
        return StageFailed.code
    return error.code if isinstance(error, DermError) else DermError.code

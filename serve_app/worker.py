"""What runs beside answering: the record's invariants checked, the audit log's new events sealed and signed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
import logging
from time import monotonic
from typing import Any

from serve_app.audit.checkpoints import Checkpoint, CheckpointLog
from serve_app.domain.assessment import format_time
from serve_app.domain.errors import DermError, IntegrityError
from serve_app.records.audit_log import AuditChain, sign_head
from serve_app.records.health import Violation, find_violations
from serve_app.records.pool import Pool

#: A check reads the live space through: 50 ms of the database for 50,000 references.
CHECK_EVERY_S = 600.0
#: Not while the service starts.
FIRST_CHECK_AFTER_S = 20.0

_log = logging.getLogger(__name__)


class InvariantWatch:
    """What the last check found. A violation is reported and does not take the service down."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._violations: list[Violation] | None = None
        self._checked_at: datetime | None = None

    async def check(self) -> None:
        """Check now; what is found is logged, too. RecordsUnavailable as the pool says."""
        self._violations = await find_violations(self._pool)
        self._checked_at = datetime.now(UTC)
        for violation in self._violations:
            _log.error("violated: %s (%d rows)", violation.invariant, violation.count)

    async def check_forever(self) -> None:
        """Check now and then until cancelled."""
        await asyncio.sleep(FIRST_CHECK_AFTER_S)
        while True:
            try:
                await self.check()
            except DermError as error:
                _log.warning("invariants not checked: %s", error)
            await asyncio.sleep(CHECK_EVERY_S)

    def describe(self) -> dict[str, Any]:
        """For /readyz: when the last check was (null before the first), and the invariants that do not hold."""
        return {
            "checked_at": format_time(self._checked_at) if self._checked_at else None,
            "violated": [violation.invariant for violation in self._violations or ()],
        }


SEAL_EVERY_S = 2.0
CHECKPOINT_EVERY_S = 600.0
_BATCH = 1_000
#: How long one round may take; what is not sealed by then is the next one's.
_ATTEMPT_S = 120.0
#: How long a shutdown waits for the last checkpoint.
_LAST_WITHIN_S = 3.0

_sealing_log = logging.getLogger("derm.audit")


class Sealer:
    """Seals and signs; every ingress replica has one. One at a time seals, the others find nothing to do."""

    def __init__(self, chain: AuditChain, checkpoints: CheckpointLog) -> None:
        self._chain, self._checkpoints = chain, checkpoints
        self._newest: Checkpoint | None = None
        self._fault: str | None = None

    async def seal_forever(self) -> None:
        """Seal until cancelled; sign with the first seals, every ten minutes, and once more at the end."""
        next_checkpoint = monotonic()
        try:
            while True:
                await asyncio.sleep(SEAL_EVERY_S)
                if await self._attempt(sign=monotonic() >= next_checkpoint):
                    next_checkpoint = monotonic() + CHECKPOINT_EVERY_S
        finally:
            try:
                async with asyncio.timeout(_LAST_WITHIN_S):
                    await self._attempt(sign=True)
            except TimeoutError:
                _sealing_log.warning("The last events wait for their checkpoint until the next start")

    async def seal(self) -> None:
        """Seal every event that has none."""
        while await self._chain.seal(limit=_BATCH) == _BATCH:
            pass

    async def sign(self) -> None:
        """Sign the chain's head; IntegrityError, and an error in the log, where it is not what was signed before.

        A fault is reported until the chain fits again, which an operator sees to: nothing is signed meanwhile, so
        that what was signed before goes on saying what was done.
        """
        try:
            self._newest = await sign_head(self._chain, self._checkpoints)
        except IntegrityError as error:
            self._fault = str(error)
            _sealing_log.error("The audit log is not what was signed: %s", error)
            raise
        self._fault = None

    def describe(self) -> dict[str, Any]:
        """For /readyz: when the newest checkpoint was signed, and whether the log fits it (null before the first)."""
        looked = self._newest is not None or self._fault is not None
        return {
            "checkpoint_at": format_time(self._newest.at) if self._newest else None,
            "sound": self._fault is None if looked else None,
        }

    async def _attempt(self, *, sign: bool) -> bool:
        """Do one round; says whether it signed, or found out that it must not."""
        try:
            async with asyncio.timeout(_ATTEMPT_S):
                await self.seal()
                if sign:
                    await self.sign()
        except IntegrityError:
            return sign
        except Exception as error:  # noqa: BLE001 - whatever fails now, the next round must come
            _sealing_log.warning("Sealing waits: %s", type(error).__name__)
            return False
        return sign and self._newest is not None

"""Sealing the audit log's new events, moments after they were written, and checkpoints of it now and then."""

from __future__ import annotations

import asyncio
import logging
from time import monotonic
from typing import Any

from serve_app.api.answers import format_time
from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_chain import AuditChain
from serve_app.records.audit_witness import sign_head
from serve_app.security.checkpoints import Checkpoint, CheckpointLog

EVERY_S = 2.0
CHECKPOINT_EVERY_S = 600.0
_BATCH = 1_000
#: How long one round may take; what is not sealed by then is the next one's.
_ATTEMPT_S = 120.0
#: How long a shutdown waits for the last checkpoint.
_LAST_WITHIN_S = 3.0

_log = logging.getLogger("derm.audit")


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
                await asyncio.sleep(EVERY_S)
                if await self._attempt(sign=monotonic() >= next_checkpoint):
                    next_checkpoint = monotonic() + CHECKPOINT_EVERY_S
        finally:
            try:
                async with asyncio.timeout(_LAST_WITHIN_S):
                    await self._attempt(sign=True)
            except TimeoutError:
                _log.warning("The last events wait for their checkpoint until the next start")

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
            _log.error("The audit log is not what was signed: %s", error)
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
            _log.warning("Sealing waits: %s", type(error).__name__)
            return False
        return sign and self._newest is not None

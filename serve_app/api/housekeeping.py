"""What is done in the background beside answering: accepted erasures finished, and what is left over let go."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
import logging
import random
from time import monotonic

from serve_app.api.eraser import Eraser
from serve_app.api.orphaned_keys import stop_awaiting_stored, sweep_orphaned_keys
from serve_app.api.retention import erase_expired
from serve_app.records.housekeeping import Housekeeping
from serve_app.records.retention import RetentionStore
from serve_app.security.keystore import KeyStore

logger = logging.getLogger("derm.housekeeping")

#: How often accepted erasures and new images' keys are looked after, and everything else.
ERASURES_EVERY_S = 10.0
REST_EVERY_S = 3600.0
#: How long one part may take: each can be broken off anywhere, and goes on from there in its next round.
ATTEMPT_S = 600.0

_DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Housekeeper:
    """Every ingress replica has one; all they do is safe to do at once, and twice.

    `retention_days`: how long images are kept after their patient's record was closed; None: for good.
    """

    eraser: Eraser
    housekeeping: Housekeeping
    retention: RetentionStore
    keys: KeyStore
    idempotency_days: int
    retention_days: int | None

    async def keep_forever(self) -> None:
        """Work until cancelled; what fails is logged and tried again in the next round."""
        rest_at = monotonic()
        while True:
            # Jittered, so that replicas do not work in step.
            await asyncio.sleep(ERASURES_EVERY_S * random.uniform(0.8, 1.2))  # noqa: S311 - no secret
            await _attempt(self.eraser.finish_accepted)
            await _attempt(lambda: stop_awaiting_stored(self.housekeeping, self.keys))
            if monotonic() >= rest_at:
                rest_at = monotonic() + REST_EVERY_S
                await self.do_the_rest()

    async def do_the_rest(self) -> None:
        """Do once what has time: each part on its own, so that one that fails holds up no other."""
        await _attempt(self.eraser.erase_restored)
        await _attempt(self.expire_idempotency_keys)
        await _attempt(lambda: sweep_orphaned_keys(self.housekeeping, self.keys))
        await _attempt(self.erase_expired)

    async def expire_idempotency_keys(self) -> int:
        """Let go of the keys that no caller repeats any more; returns how many."""
        expired, batch = 0, 1000
        while found := await self.housekeeping.expire_idempotency_keys(
            older_than_s=self.idempotency_days * _DAY_S, limit=batch
        ):
            expired += found
            if found < batch:
                break
        return expired

    async def erase_expired(self) -> int:
        """Erase what is past its retention, where one is set; returns how many."""
        if self.retention_days is None:
            return 0
        return await erase_expired(self.retention, self.eraser, days=self.retention_days, actor="retention")


async def _attempt(work: Callable[[], Awaitable[int]]) -> None:
    try:
        async with asyncio.timeout(ATTEMPT_S):
            await work()
    except Exception as error:  # noqa: BLE001 - whatever fails now, the next round must come
        logger.warning("Housekeeping waits: %s", type(error).__name__)

"""The record's named invariants, checked now and then in the background, for /readyz to report."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
import logging
from typing import Any

from serve_app.api.answers import format_time
from serve_app.domain.errors import DermError
from serve_app.records.health import Violation, find_violations
from serve_app.records.pool import Pool

#: A check reads the live space through: 50 ms of the database for 50,000 references.
EVERY_S = 600.0
#: Not while the service starts.
FIRST_AFTER_S = 20.0

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
        await asyncio.sleep(FIRST_AFTER_S)
        while True:
            try:
                await self.check()
            except DermError as error:
                _log.warning("invariants not checked: %s", error)
            await asyncio.sleep(EVERY_S)

    def describe(self) -> dict[str, Any]:
        """For /readyz: when the last check was (null before the first), and the invariants that do not hold."""
        return {
            "checked_at": format_time(self._checked_at) if self._checked_at else None,
            "violated": [violation.invariant for violation in self._violations or ()],
        }

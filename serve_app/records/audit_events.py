"""Reading the audit log's events back, for those who account for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

from serve_app.records.pool import Pool
from serve_app.records.sql import queries
from serve_app.security.audit import AuditEvent

_BATCH = 1_000
_SQL = queries("audit_chain")


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """An event as it stands in the log: its number there, and the database's time of it."""

    event_id: int
    recorded_at: datetime
    event: AuditEvent


async def events_between(pool: Pool, start: datetime, end: datetime) -> AsyncIterator[RecordedEvent]:
    """Yield the events from `start` on and before `end`, oldest first, a batch in memory at a time."""
    after = 0
    while rows := await pool.fetch(_SQL["events_between"], start, end, after, _BATCH):
        for row in rows:
            fields = {name: row[name] for name in AuditEvent.__dataclass_fields__}
            yield RecordedEvent(row["event_id"], row["recorded_at"], AuditEvent(**fields))
        after = rows[-1]["event_id"]

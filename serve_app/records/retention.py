"""How long images are kept: as long as the patient's record is open, and a stated time after.

Nothing expires by itself. Once the hospital closes a record, the retention period runs from there, or from
a later image; a legal hold keeps an image beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID, uuid4

from serve_app.domain.errors import Conflict
from serve_app.records.audit_rows import event_columns
from serve_app.records.pool import Pool
from serve_app.records.sql import queries
from serve_app.security.audit import AuditEvent

_SQL = queries("retention")
_EVENTS = queries("lesions")


@dataclass(frozen=True, slots=True)
class RetentionCount:
    """How many records are closed, how many images are past their retention, and how many of these are held."""

    closed: int
    expired: int
    held: int


class RetentionStore:
    """Closes records, and finds what is past its retention. RecordsUnavailable as the pool says."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def close(self, patient_id: str, *, closed_at: datetime, actor: str) -> None:
        """Close a patient's record as of then, on record; needs the owner's role. Conflict when it is closed."""
        await self._change("close", patient_id, actor, "Its record is closed already.", closed_at, actor)

    async def reopen(self, patient_id: str, *, actor: str) -> None:
        """Open a record again, on record; needs the owner's role. Conflict when it is not closed."""
        await self._change("reopen", patient_id, actor, "Its record is not closed.")

    async def expired(self, *, days: int, limit: int) -> list[tuple[UUID, UUID]]:
        """List (lesion, image) past this many days of retention that no hold keeps, longest past first."""
        rows = await self._pool.fetch(_SQL["expired"], timedelta(days=days), limit)
        return [(row["lesion_id"], row["image_id"]) for row in rows]

    async def count(self, *, days: int) -> RetentionCount:
        """Count what a retention of this many days would erase, and what a hold keeps."""
        row = await self._pool.fetchrow(_SQL["count"], timedelta(days=days))
        assert row is not None  # noqa: S101  an aggregate always has one
        return RetentionCount(**row)

    async def _change(self, change: str, patient_id: str, actor: str, refusal: str, *values: object) -> None:
        event = AuditEvent(
            action=f"record_{change}",
            actor=actor,
            outcome="success",
            patient_id=patient_id,
            request_id=str(uuid4()),
        )
        async with self._pool.connection() as connection, connection.transaction():
            if not await connection.fetchval(_SQL[change], patient_id, *values):
                raise Conflict(refusal)
            await connection.execute(_EVENTS["record_event"], *event_columns(event))

"""Who may reach whom: care assignments, emergency accesses, and who is locked out."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import asyncpg

from serve_app.access.rules import Principal
from serve_app.audit.events import AuditEvent
from serve_app.audit.rows import CARE_ASSIGNMENTS, EMERGENCY_ACCESSES, REVOCATIONS, AuditedTable, vouch
from serve_app.domain.assessment import Id, Shape, Time
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Store, from_row, queries

_SQL = queries("access")

ReviewOutcome = Literal["justified", "not_justified", "follow_up"]
RevocationKind = Literal["subject", "token"]


@dataclass(frozen=True, slots=True)
class CareAssignment:
    """A patient is in a principal's care from `starts_at` until `ends_at` (None: until further notice)."""

    patient_id: str
    clinician: str
    starts_at: datetime
    ends_at: datetime | None


@dataclass(frozen=True, slots=True)
class Revocation:
    """A subject (`sub`) or a single token (`jti`) that is refused."""

    kind: RevocationKind
    value: str
    revoked_at: datetime
    revoked_by: str


@dataclass(frozen=True, slots=True)
class EmergencyAccess(Shape):
    """One emergency access; `accesses` counts what was done under it so far, by action.

    `ended_at` is there where it was ended before its time (`ends_at`), by a review or a command.
    """

    emergency_id: Id
    patient_id: str
    principal: str
    reason: str = field(repr=False)
    starts_at: Time
    ends_at: Time
    reviewed_at: Time | None
    reviewer: str | None
    review_outcome: ReviewOutcome | None
    review_note: str | None = field(repr=False)
    ended_at: Time | None
    ended_by: str | None
    accesses: dict[str, int]


def _emergency(row: asyncpg.Record) -> EmergencyAccess:
    """Leave out what is nobody's to see, the row's salt; what was done under the access is there where it was counted."""
    values = {name: row[name] for name in EmergencyAccess.__dataclass_fields__ if name in row}
    return from_row(EmergencyAccess, {"accesses": {}, **values})


class AccessStore(Store):
    """Reads and changes access; every change is committed with its audit event, or not at all.

    Assigning, ending by command, revoking and restoring need the owner's role: the service cannot widen
    anyone's access but by an emergency access, which is reviewed.
    """

    async def is_revoked(self, principal: Principal) -> bool:
        """Say whether the principal, or the very token it came with, is locked out."""
        revoked: bool = await self._pool.fetchval(_SQL["is_revoked"], principal.subject, principal.token_id)
        return revoked

    async def revoke(self, kind: RevocationKind, value: str, *, by: str, event: AuditEvent) -> bool:
        """Lock out from the next request on; False, and nothing, when it was before."""
        return bool(await self._change(REVOCATIONS, "revoke", kind, value, by, event=event))

    async def restore(self, kind: RevocationKind, value: str, *, event: AuditEvent) -> bool:
        """Let in again; False, and nothing, when it was not locked out."""
        return bool(await self._change(REVOCATIONS, "restore", kind, value, event=event))

    async def revocations(self) -> list[Revocation]:
        """List who is locked out, newest first."""
        return await self._pool.find_all(Revocation, _SQL["revocations"])

    async def assign(self, care: CareAssignment, *, event: AuditEvent) -> None:
        """Put a patient into somebody's care. Conflict when the end is not after the start."""
        await self._change(CARE_ASSIGNMENTS, "assign", *astuple(care), event=event)

    async def end_assignment(self, patient_id: str, clinician: str, *, event: AuditEvent) -> int:
        """End somebody's care for a patient now; returns how many assignments were in force or to come."""
        return len(await self._change(CARE_ASSIGNMENTS, "end_assignment", patient_id, clinician, event=event))

    async def assignments(
        self, *, patient_id: str | None = None, clinician: str | None = None, ended_too: bool = False
    ) -> list[CareAssignment]:
        """List care assignments: those in force or to come, unless `ended_too`."""
        return await self._pool.find_all(
            CareAssignment, _SQL["assignments"], patient_id, clinician, ended_too
        )

    async def break_glass(
        self,
        emergency_id: UUID,
        patient_id: str,
        principal: str,
        reason: str,
        *,
        lasts: timedelta,
        event: AuditEvent,
    ) -> EmergencyAccess:
        """Open an emergency access from now on; the clock is the database's."""
        values = (emergency_id, patient_id, principal, reason, lasts)
        (row,) = await self._change(EMERGENCY_ACCESSES, "break_glass", *values, event=event)
        return _emergency(row)

    async def emergency(self, emergency_id: UUID) -> EmergencyAccess | None:
        """Find one emergency access, without counting what was done under it."""
        row = await self._pool.fetchrow(_SQL["emergency"], emergency_id)
        return _emergency(row) if row else None

    async def emergencies(self, *, reviewed: bool, after: UUID | None, limit: int) -> list[EmergencyAccess]:
        """List the emergency accesses that wait for a review, or those reviewed; oldest first."""
        rows = await self._pool.fetch(_SQL["emergencies"], reviewed, after, limit)
        return [_emergency(row) for row in rows]

    async def review(
        self,
        emergency_id: UUID,
        *,
        reviewer: str,
        outcome: ReviewOutcome,
        note: str | None,
        event: AuditEvent,
    ) -> EmergencyAccess | None:
        """Judge an emergency access; None, and nothing, when it was judged before. Conflict for one's own.

        One that was not justified ends with it, and so does whatever else lets its principal to that patient in an
        emergency: the event names these as `ended`.
        """
        async with self._pool.connection() as connection, connection.transaction():
            rows = await connection.fetch(_SQL["review"], emergency_id, reviewer, outcome, note)
            if not rows:
                return None
            if ended := [str(row["emergency_id"]) for row in rows[1:]]:
                event = replace(event, detail={**event.detail, "ended": ended})
            await record_event(connection, vouch(event, EMERGENCY_ACCESSES, rows))
            return _emergency(rows[0])

    async def end_emergency(self, emergency_id: UUID, *, by: str, event: AuditEvent) -> bool:
        """End an emergency access from the next request on; False, and nothing, when it is not in force."""
        return bool(await self._change(EMERGENCY_ACCESSES, "end_emergency", emergency_id, by, event=event))

    async def open_emergencies(
        self, *, patient_id: str | None = None, principal: str | None = None, ended_too: bool = False
    ) -> list[EmergencyAccess]:
        """List emergency accesses without what was done under them: those in force, unless `ended_too`."""
        rows = await self._pool.fetch(_SQL["open_emergencies"], patient_id, principal, ended_too)
        return [_emergency(row) for row in rows]

    async def _change(
        self, table: AuditedTable, query: str, *args: object, event: AuditEvent
    ) -> list[asyncpg.Record]:
        """Run a statement that returns the rows that it changes, whole, and if there are any record the event with them."""
        async with self._pool.connection() as connection, connection.transaction():
            rows: list[asyncpg.Record] = await connection.fetch(_SQL[query], *args)
            if rows:
                await record_event(connection, vouch(event, table, rows))
            return rows

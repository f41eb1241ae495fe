"""Legal holds: what must not be erased for now, by nobody and for no reason."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from serve_app.domain.errors import Conflict, Erased, NotFound
from serve_app.domain.identifiers import new_id
from serve_app.records.audit_rows import event_columns
from serve_app.records.pool import Pool
from serve_app.records.sql import queries
from serve_app.security.audit import AuditEvent

_SQL = queries("holds")
_EVENTS = queries("lesions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a hold is on: exactly one of a patient (with images to come), a lesion (likewise) or an image."""

    patient_id: str | None = None
    lesion_id: UUID | None = None
    image_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A legal hold; in force until it is released."""

    hold_id: UUID
    patient_id: str | None
    lesion_id: UUID | None
    image_id: UUID | None
    reason: str
    set_by: str
    set_at: datetime
    released_by: str | None
    released_at: datetime | None


class HoldStore:
    """Sets, releases and lists holds; needs the owner's role. Each change is audited in its transaction."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def set(self, held: Held, *, reason: str, actor: str) -> UUID:
        """Put a hold in force and return its id; what is erased later than this returns is not held's.

        NotFound for a lesion or image that is not there, Erased for an image that is gone already. A patient
        needs no record yet. Conflict when `held` is not exactly one thing, or for an empty or long reason.
        """
        hold_id = new_id()
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_SQL["against_erasure"])
            found = await connection.fetchrow(
                _SQL["find_patient"], held.patient_id, held.lesion_id, held.image_id
            )
            if found["patient_id"] is None:
                raise NotFound("There is nothing by that id to hold.")
            if found["erased"]:
                raise Erased
            await connection.execute(
                _SQL["set"], hold_id, held.patient_id, held.lesion_id, held.image_id, reason, actor
            )
            event = _event("hold_set", actor, found["patient_id"], held.lesion_id, held.image_id, hold_id)
            await connection.execute(_EVENTS["record_event"], *event_columns(event))
        return hold_id

    async def release(self, hold_id: UUID, *, actor: str) -> None:
        """Take a hold out of force; Conflict when there is none by that id, or it is released already."""
        async with self._pool.connection() as connection, connection.transaction():
            row = await connection.fetchrow(_SQL["release"], hold_id, actor)
            if row is None:
                raise Conflict(f"No hold {hold_id} is in force.")
            event = _event(
                "hold_release", actor, row["patient_id"], row["lesion_id"], row["image_id"], hold_id
            )
            await connection.execute(_EVENTS["record_event"], *event_columns(event))

    async def find(self, *, released: bool = False) -> list[Hold]:
        """List the holds in force, newest first; with `released`, those that were, too."""
        return [Hold(**row) for row in await self._pool.fetch(_SQL["list"], released)]


def _event(
    action: str, actor: str, patient_id: str, lesion_id: UUID | None, image_id: UUID | None, hold_id: UUID
) -> AuditEvent:
    return AuditEvent(
        action=action,
        actor=actor,
        outcome="success",
        patient_id=patient_id,
        lesion_id=lesion_id,
        image_id=image_id,
        request_id=str(uuid4()),
        detail={"hold_id": str(hold_id)},
    )

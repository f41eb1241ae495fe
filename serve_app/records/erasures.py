"""Accepted erasures and their receipts, and the legal holds that forbid an erasure.

An erasure is accepted in one transaction, which destroys all that the database holds of the image, and
proven in a second one, once its data key is gone. What was accepted and not proven is finished later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from uuid import UUID, uuid4

import asyncpg

from serve_app.audit.events import account_event, event_about
from serve_app.audit.rows import LEGAL_HOLDS, vouch
from serve_app.domain.errors import Conflict, Erased, IntegrityError, NotFound
from serve_app.domain.identifiers import new_id
from serve_app.keys.receipts import ErasureReason, Receipt
from serve_app.records.audit_log import event_parameters, record_event
from serve_app.records.pool import Store, from_row, queries
from serve_app.sql import bind

_SQL = queries("erasures")
_FIRST = UUID(int=0)


class Verdict(StrEnum):
    """What became of a request to erase."""

    ACCEPTED = "accepted"
    ERASED = "erased"
    HELD = "held"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class ErasureRequest:
    """Who wants an image erased, and why; `note` (1 to 500 characters) is kept and never logged.

    `receipt_id` is given only where an erasure is done again that a restored database has forgotten.
    """

    lesion_id: UUID
    image_id: UUID
    reason: ErasureReason
    note: str | None = None
    actor: str
    request_id: str = field(default_factory=lambda: str(uuid4()))
    receipt_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """An accepted erasure; `receipt` is None until its data key is known to be gone."""

    receipt_id: UUID
    lesion_id: UUID
    image_id: UUID
    patient_id: str
    data_key_id: UUID
    ciphertext_sha256: bytes
    reason: ErasureReason
    actor: str
    request_id: str
    receipt: Receipt | None = None

    def prove(self, erased_at: datetime) -> Receipt:
        """Make the receipt; only for whoever has seen the data key destroyed."""
        shared = {item.name: getattr(self, item.name) for item in fields(Receipt) if item.name != "erased_at"}
        return Receipt(**shared, erased_at=erased_at)


class ErasureStore(Store):
    """Accepts, finds and proves erasures."""

    async def accept(self, request: ErasureRequest) -> Verdict:
        """Commit to an erasure: ciphertext, vectors and findings are gone, a pending assessment is cancelled.

        Nothing changes unless ACCEPTED, and the audit event is in the same transaction.
        """
        values = asdict(request) | {"receipt_id": request.receipt_id or new_id()}
        return Verdict(await self._pool.fetchval(*bind(_SQL["accept"], values)))

    async def find(self, lesion_id: UUID, image_id: UUID) -> Erasure | None:
        """Find an image's erasure; IntegrityError when its receipt is not the one that was recorded."""
        row = await self._pool.fetchrow(_SQL["find"], lesion_id, image_id)
        return _erasure(row) if row else None

    async def unproven(
        self, *, older_than_s: float, limit: int, after: UUID = _FIRST
    ) -> list[tuple[UUID, UUID, UUID]]:
        """List (receipt, lesion, image) of what was accepted this long ago and has no receipt yet, by receipt."""
        rows = await self._pool.fetch(_SQL["unproven"], timedelta(seconds=older_than_s), after, limit)
        return [(row["receipt_id"], row["lesion_id"], row["image_id"]) for row in rows]

    async def restored(self, data_key_ids: Sequence[UUID]) -> dict[UUID, tuple[UUID, UUID]]:
        """Of these destroyed data keys, those whose (lesion, image) is there: only a restored backup has such."""
        rows = await self._pool.fetch(_SQL["restored"], data_key_ids)
        return {row["data_key_id"]: (row["lesion_id"], row["image_id"]) for row in rows}

    async def prove(self, erasure: Erasure, *, message_id: UUID | None = None, fhir: bool = False) -> Receipt:
        """Record that the data key is gone, with the audit event; the receipt of whoever did so first.

        With a `message_id`, and for an image that names an encounter, the message to the PMS is part of the
        same commit; it keeps the id of the assessment's message where that was delivered before. `fhir`: the lesion's
        report goes there, too.
        """
        receipt = erasure.prove(datetime.now(UTC))
        detail = {
            "receipt_id": str(receipt.receipt_id),
            "reason": receipt.reason,
            "ciphertext_sha256": receipt.ciphertext_sha256.hex(),
            "data_key_id": str(receipt.data_key_id),
            "record_hash": receipt.record_hash.hex(),
        }
        values = asdict(receipt) | {
            "record_hash": receipt.record_hash,
            "message_id": message_id,
            "fhir": fhir,
        }
        event = event_about(erasure, "erased", detail=detail)
        await self._pool.execute(*bind(_SQL["prove"], values | event_parameters(event)))
        found = await self.find(erasure.lesion_id, erasure.image_id)
        if found is None or found.receipt is None:
            raise IntegrityError(f"The receipt {erasure.receipt_id} was recorded and is not there.")
        return found.receipt


def _erasure(row: asyncpg.Record) -> Erasure:
    erasure = from_row(Erasure, row)
    if row["erased_at"] is None:
        return erasure
    receipt = erasure.prove(row["erased_at"])
    if receipt.record_hash != row["record_hash"]:
        raise IntegrityError(f"The receipt {receipt.receipt_id} is not the one that was recorded.")
    return replace(erasure, receipt=receipt)


_HOLDS_SQL = queries("holds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a hold is on: exactly one of a patient (with images to come), a lesion (likewise) or an image."""

    patient_id: str | None = None
    lesion_id: UUID | None = None
    image_id: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold(Held):
    """A legal hold; in force until it is released."""

    hold_id: UUID
    reason: str
    set_by: str
    set_at: datetime
    released_by: str | None
    released_at: datetime | None


class HoldStore(Store):
    """Sets, releases and lists holds; needs the owner's role. Each change is audited in its transaction."""

    async def set(self, held: Held, *, reason: str, actor: str) -> UUID:
        """Put a hold in force and return its id; what is erased later than this returns is not held's.

        NotFound for a lesion or image that is not there, Erased for an image that is gone already. A patient
        needs no record yet. Conflict when `held` is not exactly one thing, or for an empty or long reason.
        """
        hold_id = new_id()
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_HOLDS_SQL["against_erasure"])
            found = await connection.fetchrow(_HOLDS_SQL["find_patient"], *astuple(held))
            if found["patient_id"] is None:
                raise NotFound("There is nothing by that id to hold.")
            if found["erased"]:
                raise Erased
            rows = await connection.fetch(_HOLDS_SQL["set"], hold_id, *astuple(held), reason, actor)
            about = asdict(held) | {"patient_id": found["patient_id"]}
            event = account_event("hold_set", {"hold_id": str(hold_id)}, actor=actor, **about)
            await record_event(connection, vouch(event, LEGAL_HOLDS, rows))
        return hold_id

    async def release(self, hold_id: UUID, *, actor: str) -> None:
        """Take a hold out of force; Conflict when there is none by that id, or it is released already."""
        async with self._pool.connection() as connection, connection.transaction():
            row = await connection.fetchrow(_HOLDS_SQL["release"], hold_id, actor)
            if row is None:
                raise Conflict(f"No hold {hold_id} is in force.")
            about = {name: row[name] for name in ("lesion_id", "image_id")} | {
                "patient_id": row["of_patient"]
            }
            event = account_event("hold_release", {"hold_id": str(hold_id)}, actor=actor, **about)
            await record_event(connection, vouch(event, LEGAL_HOLDS, [row]))

    async def find(self, *, released: bool = False) -> list[Hold]:
        """List the holds in force, newest first; with `released`, those that were, too."""
        return await self._pool.find_all(Hold, _HOLDS_SQL["list"], released)

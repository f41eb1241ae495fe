"""What clinicians say of assessments, and what lesions turned out to be: recorded once, with the demands that it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import asyncpg

from serve_app.audit.events import AuditEvent
from serve_app.audit.rows import ASSESSMENTS, LESION_OUTCOMES, REVIEW_NOTES, REVIEWS, vouch
from serve_app.domain.assessment import OpenDemand
from serve_app.domain.errors import (
    AssessmentPending,
    Conflict,
    DermError,
    Erased,
    IdempotencyMismatch,
    NotFound,
)
from serve_app.domain.identifiers import new_id
from serve_app.domain.review import LesionOutcome, Review
from serve_app.records.audit_log import record_event
from serve_app.records.lesions import assessment_row
from serve_app.records.outbox import MessageKind
from serve_app.records.pool import Store, from_row, queries

_SQL = queries("reviews")
_DEMAND = queries("lesions")["open_demand"]
_REFUSALS: Mapping[str, tuple[type[DermError], str]] = {
    "absent": (NotFound, "assessment_id: this lesion has no such assessment."),
    "erased": (
        Erased,
        "The image was erased: only what it demanded can be decided on, without a note and an impression.",
    ),
    "failed": (Conflict, "The image could not be assessed: there is no answer to review."),
    "pending": (AssessmentPending, "A decision needs an answer: ask again when the assessment has finished."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a clinician says of a lesion: the columns of `reviews` or `lesion_outcomes` by name, as they were sent.

    `key` and `request_sha256` (32 bytes) come with an Idempotency-Key. `event` is that of the request; `tells_pms`:
    whether the PMS is told, where an encounter is named; `tells_fhir`: the lesion's report, too.
    """

    lesion_id: UUID
    said: Mapping[str, object]
    event: AuditEvent
    tells_pms: bool = False
    tells_fhir: bool = False
    key: str | None = None
    request_sha256: bytes | None = None


@dataclass(frozen=True, slots=True)
class OnRecord:
    """A review or an outcome, and whose lesion it is of."""

    lesion_id: UUID
    patient_id: str
    said: Mapping[str, Any]

    @property
    def review(self) -> Review:
        """It as a review."""
        return from_row(Review, self.said)

    @property
    def outcome(self) -> LesionOutcome:
        """It as an outcome."""
        return from_row(LesionOutcome, self.said)


class ReviewStore(Store):
    """Reviews and outcomes; each is one transaction with its audit event and its message to the PMS.

    Where a key led to one before, that is returned and `event` is not written: the caller says that it was looked at.
    IdempotencyMismatch where it came with something else.
    """

    async def review(self, statement: Statement) -> tuple[Review, OpenDemand | None, bool]:
        """Record a review, and answer the demands that its decision answers; with what the lesion demands then.

        True where it is new. An impression has `before_answer` where its clinician cannot have been given the answer:
        none that comes with a decision on it.
        NotFound: the lesion has no such assessment. Erased; Conflict: it failed; AssessmentPending for a decision.
        """
        async with self._pool.connection() as connection, connection.transaction():
            review_id, is_new = await _claim(connection, statement)
            if is_new:
                said = {**statement.said, "review_id": str(review_id), **_of(statement, "clinician")}
                if said.get("impression_diagnosis") or said.get("intended_referral"):
                    asked = statement.event.actor, said["assessment_id"]
                    decides = said.get("decision") is not None
                    said["before_answer"] = not (decides or await connection.fetchval(_SQL["given"], *asked))
                verdict = await connection.fetchval(_SQL["record"], statement.lesion_id, said)
                if verdict in _REFUSALS:
                    refusal, why = _REFUSALS[verdict]
                    raise refusal(why)
                row = await connection.fetchrow(_SQL["recorded"], review_id)
                answered = await connection.fetch(_SQL["answered"], row["answers"])
                event = vouch(replace(statement.event, image_id=row["image_id"]), REVIEWS, [row])
                if row["note"] is not None:
                    event = vouch(event, REVIEW_NOTES, [row])
                if answered:
                    event = vouch(event, ASSESSMENTS, map(assessment_row, answered))
                told = await _queue(connection, statement, MessageKind.REVIEW, review_id, row["image_id"])
                await record_event(connection, replace(event, detail={**event.detail, **told}))
            found = from_row(OnRecord, await connection.fetchrow(_SQL["review"], review_id))
            demand = await connection.fetchval(_DEMAND, statement.lesion_id)
        return found.review, from_row(OpenDemand, demand) if demand else None, is_new

    async def record_outcome(self, statement: Statement) -> tuple[LesionOutcome, bool]:
        """Record what a lesion turned out to be; True where it is new.

        NotFound, Erased: of the image that it names.
        """
        async with self._pool.connection() as connection, connection.transaction():
            outcome_id, is_new = await _claim(connection, statement)
            if is_new:
                if (image_id := statement.said.get("image_id")) is not None:
                    erased = await connection.fetchval(_SQL["named_image"], statement.lesion_id, image_id)
                    if erased is None:
                        raise NotFound("image_id: this lesion has no such image.")
                    if erased:
                        raise Erased
                ids = {"outcome_id": str(outcome_id), "lesion_id": str(statement.lesion_id)}
                said = {**statement.said, **ids, **_of(statement, "recorded_by")}
                row = await connection.fetchrow(_SQL["record_outcome"], said)
                event = vouch(statement.event, LESION_OUTCOMES, [row])
                told = await _queue(connection, statement, MessageKind.OUTCOME, outcome_id, row["image_id"])
                await record_event(connection, replace(event, detail={**event.detail, **told}))
            found = from_row(OnRecord, await connection.fetchrow(_SQL["outcome"], outcome_id))
        return found.outcome, is_new

    async def find_review(self, review_id: UUID) -> OnRecord | None:
        """Find a review by its id."""
        return await self._pool.find(OnRecord, _SQL["review"], review_id)

    async def find_outcome(self, outcome_id: UUID) -> OnRecord | None:
        """Find an outcome by its id."""
        return await self._pool.find(OnRecord, _SQL["outcome"], outcome_id)


def _of(statement: Statement, who: str) -> dict[str, object]:
    return {who: statement.event.actor, "request_id": statement.event.request_id}


async def _claim(connection: asyncpg.Connection, statement: Statement) -> tuple[UUID, bool]:
    """A new id; or that to which the key led before, and False."""
    created = new_id()
    if statement.key is None:
        return created, True
    named = statement.event.actor, statement.key
    taken = *named, statement.request_sha256, statement.lesion_id, created
    if await connection.fetchval(_SQL["claim_key"], *taken):
        return created, True
    known = await connection.fetchrow(_SQL["find_key"], *named)
    if known is None or known["created_id"] is None or known["request_sha256"] != statement.request_sha256:
        raise IdempotencyMismatch
    return known["created_id"], False


async def _queue(
    connection: asyncpg.Connection,
    statement: Statement,
    kind: MessageKind,
    subject: UUID,
    image_id: UUID | None,
) -> dict[str, str]:
    """Have the PMS told, if it is; returns what the event says of that: the message, and in whose encounter it goes."""
    if not statement.tells_pms:
        return {}
    message_id = new_id()
    told: UUID | None = await connection.fetchval(
        _SQL["queue"], message_id, kind, subject, image_id, statement.lesion_id, statement.tells_fhir
    )
    return {} if told is None else {"message_id": str(message_id), "encounter_of": str(told)}

"""What clinicians say: of assessments, with the demands that it answers; what lesions turned out to be, and which are one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import asyncpg

from serve_app.audit.events import AuditEvent
from serve_app.audit.rows import ASSESSMENTS, LESION_LINKS, LESION_OUTCOMES, REVIEW_NOTES, REVIEWS, vouch
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
from serve_app.domain.review import LesionLink, LesionOutcome, Review
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
_NOT_LINKED: Mapping[str, tuple[type[DermError], str]] = {
    "absent": (NotFound, "earlier_lesion_id: this patient has no such lesion."),
    "not_earlier": (Conflict, "earlier_lesion_id: not an earlier lesion; link the later one to the earlier."),
    "linked": (Conflict, "This lesion is linked already: unlink it first."),
    "not_first": (
        Conflict,
        "earlier_lesion_id: that lesion is linked itself; link to the one that it is linked to.",
    ),
    "first_of_others": (
        Conflict,
        "Other lesions are linked to this one: unlink them first, and link each to the earlier.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a clinician says of a lesion: the columns of `reviews`, `lesion_outcomes` or `lesion_links` by name, as they were sent.

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

    async def link(self, statement: Statement) -> tuple[LesionLink, OpenDemand | None, bool]:
        """Link a lesion to an earlier one of its patient; with what it demands then. True where it is new.

        NotFound: the patient has no such lesion. Conflict: it is not earlier, either is linked to another, or others are to this.
        """
        async with self._pool.connection() as connection, connection.transaction():
            link_id, is_new = await _claim(connection, statement)
            if is_new:
                ids = {"link_id": str(link_id), "lesion_id": str(statement.lesion_id)}
                said = {**statement.said, **ids, **_of(statement, "linked_by")}
                verdict = await connection.fetchval(_SQL["link"], said)
                if verdict in _NOT_LINKED:
                    refusal, why = _NOT_LINKED[verdict]
                    raise refusal(why)
            return await _linked(connection, statement, link_id, is_new=is_new)

    async def unlink(self, statement: Statement) -> tuple[LesionLink, OpenDemand | None, bool]:
        """End the link of a lesion to an earlier one, as `link` makes it; Conflict where it has none.

        What was open for both stays open for each.
        """
        async with self._pool.connection() as connection, connection.transaction():
            in_force = await connection.fetchval(_SQL["link_in_force"], statement.lesion_id)
            link_id, is_new = await _claim(connection, statement, in_force)
            if is_new:
                by, why = statement.event.actor, statement.said["reason"]
                if not await connection.fetchval(
                    _SQL["unlink"], link_id, by, why, statement.event.request_id
                ):
                    raise Conflict("This lesion is linked to no earlier one.")
            return await _linked(connection, statement, link_id, is_new=is_new)

    async def find_review(self, review_id: UUID) -> OnRecord | None:
        """Find a review by its id."""
        return await self._pool.find(OnRecord, _SQL["review"], review_id)

    async def find_outcome(self, outcome_id: UUID) -> OnRecord | None:
        """Find an outcome by its id."""
        return await self._pool.find(OnRecord, _SQL["outcome"], outcome_id)


def _of(statement: Statement, who: str) -> dict[str, object]:
    return {who: statement.event.actor, "request_id": statement.event.request_id}


async def _linked(
    connection: asyncpg.Connection, statement: Statement, link_id: UUID, *, is_new: bool
) -> tuple[LesionLink, OpenDemand | None, bool]:
    """A link as it is now, what its lesion demands, and whether this made it so: then with the event, and the PMS told."""
    if is_new:
        row = await connection.fetchrow(_SQL["link_row"], link_id)
        about = {"link_id": str(link_id), "earlier_lesion_id": str(row["earlier_lesion_id"])}
        event = replace(statement.event, detail={**statement.event.detail, **about})
        await record_event(connection, vouch(event, LESION_LINKS, [row]))
        if statement.tells_fhir:
            await connection.execute(_SQL["tell_again"], statement.lesion_id)
    link = from_row(LesionLink, await connection.fetchrow(_SQL["find_link"], link_id))
    demand = await connection.fetchval(_DEMAND, statement.lesion_id)
    return link, from_row(OpenDemand, demand) if demand else None, is_new


async def _claim(
    connection: asyncpg.Connection, statement: Statement, created: UUID | None = None
) -> tuple[UUID, bool]:
    """What the statement is about: a new id, or `created`; or that to which the key led before, and False."""
    created = created or new_id()
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

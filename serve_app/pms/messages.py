"""What the PMS is told in a message of each kind: where it goes, how its body is made, and how it is acknowledged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid5

from pydantic import TypeAdapter

from serve_app.domain.errors import NotFound
from serve_app.domain.review import LesionOutcome, Review
from serve_app.fhir.codes import MEDIA_TYPE
from serve_app.fhir.report import lesion_report
from serve_app.records.answers import assessment_document, references_of
from serve_app.records.lesion_rows import AssessmentRecord
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import ClaimedMessage, MessageKind
from serve_app.records.pool import Pool
from serve_app.records.reports import ReportStore
from serve_app.records.reviews import OnRecord, ReviewStore

#: Makes a body of the record as it is now; given the assessment that the message is about, or None for a report.
Body = Callable[[ClaimedMessage, Any], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class PmsResource:
    """What messages of one kind create at the PMS: `POST /api/encounters/{id}/{name}`, or `/api/{name}` for a report.

    `acknowledged_by`: the field of the body that holds the id of what is told, which the PMS's answer repeats.
    """

    name: str
    acknowledged_by: str
    body: Body
    media_type: str = "application/json"

    def path(self, message: ClaimedMessage) -> tuple[str, ...]:
        """Where a message goes."""
        encounter = () if message.encounter_id is None else ("encounters", message.encounter_id)
        return ("api", *encounter, self.name)


#: By kind, all that this version tells; whatever is queued of another kind waits for one that does.
Resources = Mapping[MessageKind, PmsResource]


def pms_resources(pool: Pool, *, pms_url: str) -> Resources:
    """Every kind of message that is told; one more is one more entry here."""
    records, reviews = LesionStore(pool), ReviewStore(pool)

    async def assessment(_: ClaimedMessage, found: AssessmentRecord) -> Mapping[str, Any]:
        pictured = await records.pictured(references_of(found.image))
        # What was said of it while it waited is true no more where it arrives.
        image = replace(found.image, undelivered=None)
        return assessment_document(image, found, pictured=pictured, pms_url=pms_url).answer()

    async def review(message: ClaimedMessage, _: AssessmentRecord) -> Mapping[str, Any]:
        return _said(_REVIEW, await reviews.find_review(_subject(message)))

    async def outcome(message: ClaimedMessage, _: AssessmentRecord) -> Mapping[str, Any]:
        return _said(_OUTCOME, await reviews.find_outcome(_subject(message)))

    async def fhir(_: ClaimedMessage, found: AssessmentRecord) -> Mapping[str, Any]:
        timeline = await records.timeline(found.lesion_id)
        if timeline is None:
            raise NotFound
        return lesion_report(timeline)

    async def report(message: ClaimedMessage, _: None) -> Mapping[str, Any]:
        if (found := await ReportStore(pool).snapshot(_subject(message))) is None:
            raise NotFound
        return found.answer()

    return {
        MessageKind.ASSESSMENT: PmsResource("assessments", "assessment_id", assessment),
        MessageKind.REVIEW: PmsResource("reviews", "review_id", review),
        MessageKind.OUTCOME: PmsResource("outcomes", "outcome_id", outcome),
        # Whether any is queued is a setting's; what is queued is told.
        MessageKind.FHIR: PmsResource("reports", "id", fhir, MEDIA_TYPE),
        MessageKind.REPORT: PmsResource("reports", "report_id", report),
    }


_REVIEW, _OUTCOME = TypeAdapter(Review), TypeAdapter(LesionOutcome)


def _subject(message: ClaimedMessage) -> UUID:
    if message.subject_id is None:
        raise NotFound("A message of this kind is about something.")
    return message.subject_id


def _said(shape: TypeAdapter[Any], found: OnRecord | None) -> Mapping[str, Any]:
    """What was said, as the timeline shows it, and of whose lesion."""
    if found is None:
        raise NotFound
    said = shape.dump_python(shape.validate_python(found.said), mode="json")
    return {"lesion_id": str(found.lesion_id), "patient_id": found.patient_id, **said}


def idempotency_key(message: ClaimedMessage, found: AssessmentRecord | None) -> str:
    """The message's id; for the erasure of an assessment its receipt's: two things to tell of it, kept one of each.

    What else is told again once the image is erased has a key of both.
    """
    erasure = None if found is None else found.image.erasure
    if erasure is None:
        return str(message.message_id)
    if message.kind is MessageKind.ASSESSMENT:
        return str(erasure.receipt_id)
    return str(uuid5(message.message_id, str(erasure.receipt_id)))

"""What the PMS is told in a message of each kind: where it goes, how its body is made, and how it is acknowledged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid5

from serve_app.records.answers import assessment_document, references_of
from serve_app.records.lesion_rows import AssessmentRecord
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import ClaimedMessage, MessageKind
from serve_app.records.reports import ReportStore

#: Makes a body of the record as it is now; given the assessment that the message is about, or None for a report.
Body = Callable[[ClaimedMessage, Any], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class PmsResource:
    """What messages of one kind create at the PMS: `POST /api/encounters/{id}/{name}`, or `/api/{name}` for a report.

    `acknowledged_by`: the field of the PMS's answer that holds the id of what was told (`ClaimedMessage.told_id`).
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


def pms_resources(records: LesionStore, *, pms_url: str, reports: ReportStore | None = None) -> Resources:
    """Every kind of message that is told; one more is one more entry here."""

    async def assessment(_: ClaimedMessage, found: AssessmentRecord) -> Mapping[str, Any]:
        pictured = await records.pictured(references_of(found.image))
        # What was said of it while it waited is true no more where it arrives.
        image = replace(found.image, undelivered=None)
        return assessment_document(image, found, pictured=pictured, pms_url=pms_url).answer()

    async def report(message: ClaimedMessage, _: None) -> Mapping[str, Any]:
        found = reports and message.subject_id and await reports.snapshot(message.subject_id)
        return found.answer() if found else {}

    return {
        MessageKind.ASSESSMENT: PmsResource("assessments", "assessment_id", assessment),
        MessageKind.REPORT: PmsResource("reports", "report_id", report),
    }


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

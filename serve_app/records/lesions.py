"""The clinical record: two commits a lesion image, and every way to look at them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any
from uuid import UUID

from pgvector import HalfVector

from serve_app.audit.events import AuditEvent
from serve_app.audit.rows import ASSESSMENTS, json_digest, vouch
from serve_app.domain.assessment import Assessment, OpenDemand, Outcome
from serve_app.domain.errors import Erased, NotFound, RecordsUnavailable
from serve_app.domain.review import LikeliestLesion
from serve_app.records.assessment_json import assessment_to_json
from serve_app.records.audit_log import event_parameters, record_event
from serve_app.records.lesion_rows import (
    Admission,
    AssessmentCounts,
    AssessmentRecord,
    Identity,
    ImageEmbedding,
    LesionTimeline,
    PatientAccess,
    PendingAssessment,
    PreviousAssessment,
    RecordedCase,
    Replay,
    SealedImageRecord,
)
from serve_app.records.pool import Store, from_row, queries, to_json
from serve_app.sql import bind

_SQL = queries("lesions")
#: What a distance that is not known counts as, shares of the frame: of two points of one anatomical site, judgement.
UNKNOWN_DISTANCE = 0.15


def assessment_row(values: Mapping[str, Any]) -> dict[str, Any]:
    """What an event's digest is over of an assessment: its `answer` given as text, its `embedding` as a vector or halfvec."""
    answer, vector = values["answer"], values["embedding"]
    row = {name: values[name] for name in (*ASSESSMENTS.key, *ASSESSMENTS.columns)}
    if answer is not None:
        row["answer"] = json_digest(answer)
    if vector is None:
        return row | {"embedding_space": None}
    stored = vector if isinstance(vector, HalfVector) else HalfVector(vector)
    return row | {"embedding": sha256(stored.to_binary()).hexdigest()}


class LesionStore(Store):
    """Lesions, images, assessments and the audit log; every method is one statement, and so one transaction."""

    async def access(
        self, principal_subject: str, patient_id: str | None, lesion_id: UUID | None = None
    ) -> PatientAccess:
        """Say whether the principal cares for the patient, and whose the lesion is.

        Without a patient, it is the lesion's own that is asked about.
        """
        (access,) = await self._pool.find_all(
            PatientAccess, _SQL["access"], principal_subject, patient_id, lesion_id
        )
        return access

    async def find_replay(self, actor: str, key: str) -> Replay | None:
        """Find what this caller's Idempotency-Key led to."""
        return await self._pool.find(Replay, _SQL["find_replay"], actor, key)

    async def admit(self, admission: Admission, *, lease_s: float = 0.0) -> Replay | None:
        """T1: commit the sealed image, its pending assessment and the audit event; None when done.

        For `lease_s` it is the admitting request's own to assess: `claim_pending` passes it by.
        When another request came first with the same idempotency key, nothing is written and its
        Replay returned. Conflict when the lesion is not there or not this patient's, or an id or
        data key is taken; IntegrityError when `sealed` is no sealed image.
        """
        values = admission.parameters() | {"lease": timedelta(seconds=lease_s)}
        admitted = await self._pool.fetchval(*bind(_SQL["admit"], values))
        if admitted or admission.idempotency_key is None:
            return None
        # The statement's snapshot is older than the winner's commit it waited for: look again.
        winner = await self.find_replay(admission.actor, admission.idempotency_key)
        if winner is None:
            raise RecordsUnavailable
        return winner

    async def complete(
        self,
        assessment_id: UUID,
        assessment: Assessment,
        *,
        embedding_space: str,
        event: AuditEvent,
        message_id: UUID | None = None,
        fhir: bool = False,
    ) -> bool:
        """T2: commit the answer, the embedding and the audit event; False, and nothing, when done before.

        With a `message_id`, and for an image that names an encounter, the outbox's message to the
        PMS is part of the same commit; `fhir`: one with the lesion's report is, too.
        """
        level, urgency = assessment.demand or (None, None)
        ended = {
            "outcome": assessment.outcome,
            "answer": to_json(assessment_to_json(assessment)),
            "embedding_space": embedding_space,
            "embedding": assessment.embedding,
            "demand_level": level,
            "demand_urgency": urgency,
        }
        return await self._finish(ended | {"fhir": fhir}, assessment_id, event, message_id)

    async def fail(
        self,
        assessment_id: UUID,
        failure: str,
        *,
        event: AuditEvent,
        message_id: UUID | None = None,
        fhir: bool = False,
    ) -> bool:
        """End a pending assessment that can never be answered; `failure` is the code of what keeps it from that.

        False, and nothing, when it is no longer pending. `message_id` and `fhir` as for `complete`.
        """
        ended = {"outcome": Outcome.FAILED, "failure": failure, "fhir": fhir}
        return await self._finish(ended, assessment_id, event, message_id)

    async def _finish(
        self, ended: Mapping[str, object], assessment_id: UUID, event: AuditEvent, message_id: UUID | None
    ) -> bool:
        values = defaultdict[str, Any](
            lambda: None, ended, assessment_id=assessment_id, message_id=message_id
        )
        recorded = vouch(event, ASSESSMENTS, [assessment_row(values)])
        if message_id is not None:
            recorded = replace(recorded, detail={**recorded.detail, "message_id": str(message_id)})
        finished: bool = await self._pool.fetchval(
            *bind(_SQL["finish"], defaultdict(lambda: None, values | event_parameters(recorded)))
        )
        return finished

    async def claim_pending(self, *, lease_s: float, limit: int) -> list[PendingAssessment]:
        """Lease pending assessments, oldest first, that nobody else holds; unfinished, they come up again.

        Each try doubles the lease, up to five minutes: one that always fails does not wear the stages out.
        """
        lease = timedelta(seconds=lease_s)
        return await self._pool.find_all(PendingAssessment, _SQL["claim_pending"], lease, limit)

    async def set_back(self, assessment_id: UUID) -> int:
        """Note a try that failed; returns how many have counted: those since whose last one others were answered."""
        setbacks: int | None = await self._pool.fetchval(_SQL["set_back"], assessment_id)
        return setbacks or 0

    async def counts(self) -> AssessmentCounts:
        """Count the assessments without an answer."""
        (counts,) = await self._pool.find_all(AssessmentCounts, _SQL["counts"])
        return counts

    async def previous(
        self, lesion_id: UUID, *, before: datetime, embedding_space: str
    ) -> PreviousAssessment | None:
        """Find the lesion's newest image before then that was classified and is its own, or that of one that is linked with it.

        One that was questioned (`perhaps_another_lesion`) is not, until a clinician confirms it.
        """
        asked = (embedding_space, lesion_id, before)
        return await self._pool.find(PreviousAssessment, _SQL["previous"], *asked)

    async def compared(
        self, lesion_id: UUID, image_id: UUID, *, embedding_space: str
    ) -> PreviousAssessment | None:
        """Find again the image that a later one was compared with, whether their lesions are linked now or not; None when it is gone."""
        asked = (embedding_space, lesion_id, image_id)
        return await self._pool.find(PreviousAssessment, _SQL["compared"], *asked)

    async def likeliest(self, lesion_id: UUID, *, embedding_space: str) -> LikeliestLesion | None:
        """Find the earlier lesion of the patient at the same site that a new one is likeliest to be."""
        asked = (embedding_space, lesion_id, UNKNOWN_DISTANCE)
        return await self._pool.find(LikeliestLesion, _SQL["likeliest"], *asked)

    async def timeline(self, lesion_id: UUID) -> LesionTimeline | None:
        """Tell a lesion's whole story; None when there is no such lesion."""
        rows = await self._pool.fetch(_SQL["timeline"], lesion_id)
        return LesionTimeline.from_rows(rows) if rows else None

    async def open_demand(self, lesion_id: UUID) -> OpenDemand | None:
        """Say what the lesion's images demand and no clinician has answered; no later image lowers it."""
        demand = await self._pool.fetchval(_SQL["open_demand"], lesion_id)
        return from_row(OpenDemand, demand) if demand else None

    async def confirm(
        self, lesion_id: UUID, image_id: UUID, *, confirmed_by: str, event: AuditEvent
    ) -> Identity:
        """Note that an image is of its lesion, with the audit event; the first word stands.

        NotFound when the lesion has no such image, Erased when it had: both without the event.
        """
        values = {"lesion_id": lesion_id, "image_id": image_id, "confirmed_by": confirmed_by}
        row = await self._pool.fetchrow(*bind(_SQL["confirm"], values | event_parameters(event)))
        if row is None:
            raise NotFound
        if row["erased"]:
            raise Erased
        return Identity(row["confirmed_by"], row["confirmed_at"])

    async def patient_lesions(
        self, patient_id: str, *, limit: int, cursor: tuple[datetime, UUID] | None = None
    ) -> list[LesionTimeline]:
        """List a patient's lesions, newest first, each with its newest image; `cursor` is the last one seen: (created_at, lesion_id)."""
        created_at, lesion_id = cursor or (None, None)
        rows = await self._pool.fetch(_SQL["patient_lesions"], patient_id, limit, created_at, lesion_id)
        return [LesionTimeline.from_rows([row]) for row in rows]

    async def assessment_record(self, assessment_id: UUID) -> AssessmentRecord | None:
        """Find one assessment with its image, lesion and patient."""
        row = await self._pool.fetchrow(_SQL["assessment_record"], assessment_id)
        return from_row(AssessmentRecord, dict(row) | {"image": dict(row)}) if row else None

    async def pictured(self, isic_ids: Collection[str]) -> frozenset[str]:
        """Say which of these references have a picture to show."""
        if not isic_ids:
            return frozenset()
        rows = await self._pool.fetch(_SQL["pictured"], list(isic_ids))
        return frozenset(row["isic_id"] for row in rows)

    async def recorded_case(self, lesion_id: UUID, assessment_id: UUID) -> RecordedCase | None:
        """Find what an assessment was asked and answered; None when the lesion has no such assessment."""
        return await self._pool.find(RecordedCase, _SQL["recorded_case"], lesion_id, assessment_id)

    async def sealed_image(self, lesion_id: UUID, image_id: UUID) -> SealedImageRecord | None:
        """Fetch a sealed image; None when the lesion has no such image, Erased when it had."""
        row = await self._pool.fetchrow(_SQL["sealed_image"], lesion_id, image_id)
        if row and row["sealed"] is None:
            raise Erased
        return SealedImageRecord(**row) if row else None

    async def image_embedding(self, lesion_id: UUID, image_id: UUID) -> ImageEmbedding | None:
        """Fetch an image's embedding; None when the lesion has no such image, Erased when it had."""
        row = await self._pool.fetchrow(_SQL["image_embedding"], lesion_id, image_id)
        if row and row["erased"]:
            raise Erased
        return from_row(ImageEmbedding, row) if row else None

    async def record_event(self, event: AuditEvent) -> None:
        """Commit an audit event on its own."""
        await record_event(self._pool, event)

"""The use case: one image in, one recorded assessment out.

T1 commits the sealed image with a pending assessment and its audit event, while the classifier already runs; T2
the answer. Until T1 nothing is kept, and every failure is an error to the caller. After T1 nothing is lost:
whatever fails, the caller is told `pending`, and recovery completes the record.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
import logging
from uuid import UUID

from deployments.preprocess.preprocess import PreparedImage
from serve_app.audit.events import event_about
from serve_app.domain.assessment import Assessment, OpenDemand, ReferenceFilter
from serve_app.domain.errors import NotFound, RecordsUnavailable, StageFailed
from serve_app.domain.identifiers import new_id
from serve_app.domain.patient import ClinicalContext
from serve_app.domain.review import Impression
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keystore import KeyStore
from serve_app.lesions.assess import DEADLINE_S, Assessor, Examination
from serve_app.pms.directory import RecordConsultation
from serve_app.records.lesion_rows import (
    Admission,
    AdmittedImage,
    AssessmentRecord,
    ImageRecord,
    PendingAssessment,
    Replay,
)
from serve_app.records.lesions import LesionStore
from serve_app.records.serving import LiveModel

logger = logging.getLogger("derm.triage")

#: How long everything before T1 may take, seconds: the image prepared, the directory asked, the image sealed.
PREPARE_S = 15.0
#: How long an image is its request's own from T1 on: the deadline, and the way of T1's answer back (the pool's timeout).
LEASE_S = DEADLINE_S + 5.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for what, authorised and parsed: of an accepted request, all that goes on record as it came."""

    actor: str
    request_id: str
    patient_id: str
    encounter_id: str | None
    impression: Impression | None
    top_k: int
    reference_filter: ReferenceFilter
    idempotency_key: str | None
    request_sha256: bytes | None


@dataclass(frozen=True, slots=True)
class Submission(Asked):
    """An accepted request."""

    lesion_id: UUID | None
    context: ClinicalContext
    image: bytes = field(repr=False)


async def read_original(
    records: LesionStore, keys: KeyStore, lesion_id: UUID, image_id: UUID
) -> tuple[bytes, str]:
    """The very bytes that were uploaded, and their media type.

    NotFound when the lesion has no such image, Erased when it had; IntegrityError, DataKeyMissing.
    """
    found = await records.sealed_image(lesion_id, image_id)
    if found is None:
        raise NotFound
    binding = ImageBinding(image_id, found.patient_id, found.content_type)
    return await asyncio.to_thread(keys.open_image, found.sealed, binding), found.content_type


@dataclass(frozen=True, slots=True, kw_only=True)
class Triage:
    """Runs lesions through the stages and keeps the record of it.

    `tells_pms`: what is finished for an encounter goes into the outbox, in T2's own transaction; `tells_fhir`: so does
    the lesion's report as it is then.
    """

    assessor: Assessor
    records: LesionStore
    keys: KeyStore
    consultation: RecordConsultation
    tells_pms: bool = False
    tells_fhir: bool = False

    async def submit(self, submission: Submission, live: LiveModel) -> AssessmentRecord | Replay:
        """Assess one image and record it; what is then on record has no assessment while that is pending.

        Returns the earlier record's Replay when a request with the same idempotency key won.
        Raises RejectedUpload, Overloaded, StageFailed or RecordsUnavailable with nothing stored.
        """
        # Asked while the image is prepared: the PMS costs the answer only what it takes longer.
        consulting = asyncio.create_task(
            self.consultation.consult(
                submission.context, patient_id=submission.patient_id, encounter_id=submission.encounter_id
            )
        )
        examination = None
        try:
            async with asyncio.timeout(PREPARE_S):
                examination = await self.assessor.examine(submission.image, live)
                context = await consulting
                with examination.timings.lap("store"):
                    admission = await self._admission(submission, context, examination.prepared)
            # Outside of that timeout: the pool has its own, and only it knows what became of the statement.
            with examination.timings.lap("store"):
                replay = await self.records.admit(admission, lease_s=LEASE_S)
        except BaseException as error:
            consulting.cancel()
            await asyncio.gather(consulting, return_exceptions=True)
            if examination is not None:
                await examination.discard()
            if isinstance(error, TimeoutError):
                raise StageFailed(
                    "Preparing the image took too long; nothing was stored, try again."
                ) from error
            raise
        if replay is not None:
            await examination.discard()
            return replay
        assessment = open_demand = None
        try:
            async with asyncio.timeout(DEADLINE_S):
                follow_up = not admission.new_lesion
                assessment = await self._complete(examination, admission, follow_up=follow_up)
        except Exception as error:  # noqa: BLE001 - the image is on record: whatever failed, recovery retries
            logger.warning("Assessment %s stays pending: %s", admission.assessment_id, type(error).__name__)
        if assessment is not None:
            try:
                open_demand = await self._open_demand(admission, assessment)
            except RecordsUnavailable:  # it is on record: as with a pending one, the answer is at Location
                assessment = None
        image = ImageRecord.of(admission, assessment)
        return AssessmentRecord(admission.lesion_id, admission.patient_id, image, open_demand)

    async def _open_demand(self, admission: Admission, assessment: Assessment) -> OpenDemand | None:
        """What the lesion demands now; a new lesion's is known without asking."""
        if not admission.new_lesion:
            return await self.records.open_demand(admission.lesion_id)
        if assessment.demand is None:
            return None
        ids = (admission.image_id, admission.assessment_id)
        return OpenDemand(*assessment.demand, *ids, admission.created_at)

    async def resume(self, pending: PendingAssessment, live: LiveModel) -> Assessment | None:
        """Complete an assessment that was left pending; raises whatever keeps it from that.

        None when it was completed elsewhere and erased since. No deadline: the caller knows for how long it is his.
        """
        binding = ImageBinding(pending.image_id, pending.patient_id, pending.content_type)
        image = await asyncio.to_thread(self.keys.open_image, pending.sealed, binding)
        examination = await self.assessor.examine(image, live)
        return await self._complete(examination, pending, follow_up=True)

    async def give_up(self, pending: PendingAssessment, code: str) -> bool:
        """End an assessment that can never be answered, once, and have the PMS told; False when it has ended."""
        event = event_about(pending, "classify", "failed", {"code": code, "attempts": pending.attempts})
        return await self.records.fail(
            pending.assessment_id,
            code,
            event=event,
            message_id=self._message_id(pending),
            fhir=self.tells_fhir,
        )

    def _message_id(self, case: AdmittedImage) -> UUID | None:
        return new_id() if self.tells_pms and case.encounter_id is not None else None

    async def _admission(
        self, submission: Submission, context: ClinicalContext, prepared: PreparedImage
    ) -> Admission:
        """Seal the image. Key first, then ciphertext: a crash leaves an orphan key, no unreadable image."""
        image_id, assessment_id = new_id(), new_id()
        binding = ImageBinding(image_id, submission.patient_id, prepared.content_type)
        return Admission(
            **{item.name: getattr(submission, item.name) for item in fields(Asked)},
            context=context,
            assessment_id=assessment_id,
            lesion_id=submission.lesion_id or new_id(),
            image_id=image_id,
            new_lesion=submission.lesion_id is None,
            created_at=datetime.now(UTC),
            sealed=await asyncio.to_thread(
                lambda: seal(submission.image, data_key=self.keys.create(), binding=binding)
            ),
            content_type=prepared.content_type,
            width=prepared.width,
            height=prepared.height,
        )

    async def _complete(
        self, examination: Examination, case: AdmittedImage, *, follow_up: bool
    ) -> Assessment | None:
        """T2; when another replica was faster, its answer is the one on record."""
        live = examination.live
        previous = None
        try:
            if follow_up:
                previous = await self.records.previous(
                    case.lesion_id, before=case.created_at, embedding_space=live.embedding_space
                )
            assessment = await self.assessor.assess(examination, case, previous=previous)
        finally:
            await examination.discard()
        detail = {"outcome": assessment.outcome, "model_id": live.model_id}
        if await self.records.complete(
            case.assessment_id,
            assessment,
            embedding_space=live.embedding_space,
            event=event_about(case, "classify", detail=detail),
            message_id=self._message_id(case),
            fhir=self.tells_fhir,
        ):
            return assessment
        recorded = await self.records.assessment_record(case.assessment_id)
        return recorded.image.assessment if recorded else None

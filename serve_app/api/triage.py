"""The use case: one image in, one recorded assessment out.

Two commits carry it. T1 stores the sealed image with a pending assessment and its audit
event, while the classifier already runs; T2 stores the answer. Until T1 nothing is kept,
and every failure is an error to the caller. After T1 nothing is lost: whatever fails, the
caller is told `pending`, and recovery completes the record.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
import logging
from time import perf_counter
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from deployments.classifier.classifier import ClassifierOutput
from deployments.preprocess.preprocess import PreparedImage
from deployments.risk.findings import Findings
from serve_app.api.answers import format_time
from serve_app.api.stages import Stages
from serve_app.domain.assessment import Assessment, Change, Outcome, Provenance
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import RejectedUpload, StageFailed
from serve_app.domain.identifiers import new_id
from serve_app.domain.patient import ClinicalContext
from serve_app.records.lesion_rows import (
    Admission,
    ImageRecord,
    PendingAssessment,
    PreviousAssessment,
    Replay,
)
from serve_app.records.lesions import LesionStore
from serve_app.records.serving import LiveModel
from serve_app.security.audit import AuditEvent
from serve_app.security.envelope import ImageBinding, data_key_id_of, open_sealed, seal
from serve_app.security.keystore import KeyStore

logger = logging.getLogger("derm.triage")


@dataclass(frozen=True, slots=True)
class Submission:
    """An accepted request: who asks for what, authorised and parsed."""

    actor: str
    request_id: str
    patient_id: str
    encounter_id: str | None
    lesion_id: UUID | None
    image: bytes
    context: ClinicalContext
    top_k: int
    licences: tuple[str, ...]
    idempotency_key: str | None
    request_sha256: bytes


@dataclass(frozen=True, slots=True)
class Stored:
    """What is on record after a submission; its assessment is None while it is pending."""

    lesion_id: UUID
    record: ImageRecord


class Triage:
    """Runs lesions through the stages and keeps the record of it."""

    def __init__(
        self,
        *,
        stages: Stages,
        records: LesionStore,
        keys: KeyStore,
        service_version: str,
        deadline_s: float = 30.0,
    ) -> None:
        self._stages = stages
        self._records = records
        self._keys = keys
        self._service_version = service_version
        self._deadline_s = deadline_s

    async def submit(self, submission: Submission, live: LiveModel) -> Stored | Replay:
        """Assess one image and record it.

        Returns the earlier record's Replay when a request with the same idempotency key won.
        Raises RejectedUpload, Overloaded, StageFailed or RecordsUnavailable with nothing stored.
        """
        timings: dict[str, float] = {}
        started = perf_counter()
        prepared = await self._prepare(live, submission.image, timings)
        lap = perf_counter()
        classifying = asyncio.create_task(self._stages.classify(live.model_id, prepared.pixels))
        classifying.add_done_callback(lambda _: timings.update(classifier=_ms(lap)))
        try:
            admission = await self._admit(submission, prepared, timings)
        except BaseException:
            await _discard(classifying)
            raise
        if isinstance(admission, Replay):
            await _discard(classifying)
            return admission
        assessment = await self._finish(
            prepared=prepared,
            classifying=classifying,
            live=live,
            case=admission,
            follow_up=submission.lesion_id is not None,
            timings=timings,
            started=started,
        )
        return Stored(
            admission.lesion_id,
            ImageRecord(
                image_id=admission.image_id,
                assessment_id=admission.assessment_id,
                encounter_id=admission.encounter_id,
                created_at=admission.created_at,
                content_type=admission.content_type,
                width=admission.width,
                height=admission.height,
                assessment=assessment,
            ),
        )

    async def resume(self, pending: PendingAssessment, live: LiveModel) -> Assessment | None:
        """Complete an assessment that was left pending; None when it still cannot be."""
        timings: dict[str, float] = {}
        started = perf_counter()
        image = await asyncio.to_thread(self._open, pending)
        prepared = await self._prepare(live, image, timings)
        classifying = asyncio.create_task(self._stages.classify(live.model_id, prepared.pixels))
        return await self._finish(
            prepared=prepared,
            classifying=classifying,
            live=live,
            case=pending,
            follow_up=True,
            timings=timings,
            started=started,
        )

    async def _prepare(self, live: LiveModel, image: bytes, timings: dict[str, float]) -> PreparedImage:
        lap = perf_counter()
        prepared = await self._stages.prepare(live.model_id, image)
        timings["preprocess"] = _ms(lap)
        if isinstance(prepared, RejectedUpload):
            raise prepared
        return prepared

    async def _admit(
        self, submission: Submission, prepared: PreparedImage, timings: dict[str, float]
    ) -> Admission | Replay:
        """T1. Key first, then ciphertext: a crash between them leaves an orphan key, never an unreadable image."""
        lap = perf_counter()
        image_id, assessment_id = new_id(), new_id()
        lesion_id = submission.lesion_id or new_id()
        binding = ImageBinding(image_id, submission.patient_id, prepared.content_type)
        sealed = await asyncio.to_thread(self._seal, submission.image, binding)
        admission = Admission(
            assessment_id=assessment_id,
            lesion_id=lesion_id,
            image_id=image_id,
            patient_id=submission.patient_id,
            encounter_id=submission.encounter_id,
            new_lesion=submission.lesion_id is None,
            created_at=datetime.now(UTC),
            sealed=sealed,
            content_type=prepared.content_type,
            width=prepared.width,
            height=prepared.height,
            context=submission.context,
            top_k=submission.top_k,
            licences=submission.licences,
            actor=submission.actor,
            request_id=submission.request_id,
            idempotency_key=submission.idempotency_key,
            request_sha256=submission.request_sha256 if submission.idempotency_key else None,
            event=AuditEvent(
                action="upload",
                actor=submission.actor,
                outcome="success",
                patient_id=submission.patient_id,
                lesion_id=lesion_id,
                image_id=image_id,
                assessment_id=assessment_id,
                request_id=submission.request_id,
            ),
        )
        replay = await self._records.admit(admission)
        timings["store"] = _ms(lap)
        return admission if replay is None else replay

    async def _finish(
        self,
        *,
        prepared: PreparedImage,
        classifying: asyncio.Task[ClassifierOutput],
        live: LiveModel,
        case: Admission | PendingAssessment,
        follow_up: bool,
        timings: dict[str, float],
        started: float,
    ) -> Assessment | None:
        """Everything after T1: any failure leaves the record pending, and says so in the log."""
        try:
            async with asyncio.timeout(self._deadline_s):
                assessment = await self._assess(
                    prepared, classifying, live, case, follow_up=follow_up, timings=timings, started=started
                )
                lap = perf_counter()
                await self._records.complete(
                    case.assessment_id,
                    assessment,
                    embedding_space=live.embedding_space,
                    event=AuditEvent(
                        action="classify",
                        actor=case.actor,
                        outcome="success",
                        patient_id=case.patient_id,
                        lesion_id=case.lesion_id,
                        image_id=case.image_id,
                        assessment_id=case.assessment_id,
                        request_id=case.request_id,
                        detail={"outcome": assessment.outcome, "model_id": live.model_id},
                    ),
                )
                logger.debug("T2 took %.1f ms", _ms(lap))
        except Exception as error:  # noqa: BLE001 - the image is on record: whatever failed, recovery retries
            logger.warning("Assessment %s stays pending: %s", case.assessment_id, type(error).__name__)
            return None
        finally:
            await _discard(classifying)
        return assessment

    async def _assess(
        self,
        prepared: PreparedImage,
        classifying: asyncio.Task[ClassifierOutput],
        live: LiveModel,
        case: Admission | PendingAssessment,
        *,
        follow_up: bool,
        timings: dict[str, float],
        started: float,
    ) -> Assessment:
        output = await classifying
        if output.model_digest != live.model_digest:
            raise StageFailed("The classifier's model is not the one that was published.")
        lap = perf_counter()
        embedding = await self._stages.embed(live.model_id, live.embedding_space, output.bottleneck)
        timings["embedder"] = _ms(lap)
        lap = perf_counter()
        neighbours = await self._stages.nearest(embedding, live.embedding_space, case.top_k, case.licences)
        timings["retriever"] = _ms(lap)
        previous = await self._previous(case, live) if follow_up else None
        change = None if previous is None else _compare(previous, output, embedding)
        lap = perf_counter()
        conclusion = await self._stages.conclude(
            live.model_id,
            Findings(
                quality=prepared.quality,
                width=prepared.width,
                height=prepared.height,
                classification=output.classification,
                neighbours=neighbours,
                context=case.context,
                change=change,
            ),
        )
        timings["risk"] = _ms(lap)
        timings["total"] = _ms(started)
        answered = conclusion.outcome is not Outcome.REFUSED
        return Assessment(
            outcome=conclusion.outcome,
            reasons=conclusion.reasons,
            quality=conclusion.quality,
            classification=output.classification if answered else None,
            risk=conclusion.risk if answered else None,
            neighbours=neighbours if answered else None,
            change=change if answered else None,
            provenance=Provenance(
                model_id=output.model_id,
                model_digest=output.model_digest,
                embedding_space=live.embedding_space,
                preprocess_version=prepared.preprocess_version,
                policy_version=conclusion.policy_version,
                service_version=self._service_version,
            ),
            embedding=embedding if answered else None,
            timings_ms=timings,
        )

    async def _previous(
        self, case: Admission | PendingAssessment, live: LiveModel
    ) -> PreviousAssessment | None:
        return await self._records.previous(
            case.lesion_id, before=case.created_at, embedding_space=live.embedding_space
        )

    def _seal(self, image: bytes, binding: ImageBinding) -> bytes:
        return seal(image, data_key=self._keys.create(), binding=binding)

    def _open(self, pending: PendingAssessment) -> bytes:
        binding = ImageBinding(pending.image_id, pending.patient_id, pending.content_type)
        data_key = self._keys.load(data_key_id_of(pending.sealed))
        return open_sealed(pending.sealed, data_key=data_key, binding=binding)


def _compare(
    previous: PreviousAssessment, output: ClassifierOutput, embedding: NDArray[np.float32]
) -> Change:
    """What moved since the last visit; similarity is a cosine, both vectors being unit."""
    melanoma = output.classification.probabilities[Diagnosis.MEL]
    return Change(
        since=format_time(previous.created_at),
        compared_image_id=str(previous.image_id),
        similarity=None if previous.embedding is None else float(previous.embedding @ embedding),
        melanoma_probability_delta=melanoma - previous.probabilities[Diagnosis.MEL],
    )


async def _discard(task: asyncio.Task[ClassifierOutput]) -> None:
    """End a task whose result is no longer wanted, without an 'exception never retrieved'."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _ms(since: float) -> float:
    return round((perf_counter() - since) * 1000.0, 2)

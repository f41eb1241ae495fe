"""What goes into the clinical record and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import asyncpg
import numpy as np
from numpy.typing import NDArray
from pydantic import PlainValidator

from serve_app.audit.events import event_about
from serve_app.audit.rows import LESION_IMAGES, REVIEWS, vouch
from serve_app.domain.assessment import (
    Assessment,
    Id,
    OpenDemand,
    Outcome,
    Probabilities,
    ReferenceFilter,
    Risk,
    RiskLevel,
    Shape,
    Time,
    one_of,
)
from serve_app.domain.identifiers import new_id
from serve_app.domain.patient import AnatomSite, BodyPosition, ClinicalContext
from serve_app.domain.review import Impression, LesionLink, LesionOutcome, Review
from serve_app.keys.envelope import TAG_BYTES, data_key_id_of
from serve_app.keys.receipts import ErasureReason
from serve_app.records.assessment_json import answer_from_json, context_to_json
from serve_app.records.audit_log import event_parameters
from serve_app.records.pool import from_row


def _vector(embedding: Any) -> NDArray[np.float32] | None:  # noqa: ANN401
    """Take a halfvec, or none, out of a row."""
    return None if embedding is None else embedding.to_numpy().astype(np.float32)


Vector = Annotated[NDArray[np.float32] | None, PlainValidator(_vector)]
Answer = Annotated[Assessment | None, PlainValidator(answer_from_json)]


@dataclass(frozen=True, slots=True)
class PatientAccess:
    """Whether a principal cares for a patient now, and whose the lesion asked for is (None: no such lesion).

    `emergency`: the emergency access to the patient that is in force, if any.
    """

    assigned: bool
    lesion_patient: str | None
    emergency: UUID | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """What an Idempotency-Key led to, and the digest of the request that it came with."""

    request_sha256: bytes
    lesion_id: UUID
    assessment_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFacts:
    """An image and its assessment, without what was made of it; times are aware. `lesion_id`: under which it is filed."""

    lesion_id: UUID
    image_id: UUID
    assessment_id: UUID
    encounter_id: str | None
    created_at: datetime
    content_type: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedImage(ImageFacts):
    """A sealed image, what it is to be assessed with, and for whom."""

    patient_id: str
    sealed: bytes = field(repr=False)
    context: ClinicalContext
    top_k: int
    reference_filter: ReferenceFilter
    actor: str
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission(AdmittedImage):
    """An image the service takes responsibility for; the ids are the caller's UUIDv7.

    Without `new_lesion`, the lesion must be there and be this patient's. `request_sha256`
    (32 bytes) comes with an idempotency key. `impression` is the actor's own, a review before the answer.
    """

    new_lesion: bool
    idempotency_key: str | None
    request_sha256: bytes | None
    impression: Impression | None = None

    def parameters(self) -> dict[str, object]:
        """The parameters of `admit`: these fields by name, and what is taken out of them."""
        row = {item.name: getattr(self, item.name) for item in fields(self)} | {
            "context": context_to_json(self.context),
            "licences": self.reference_filter.licences,
            "confirmed_only": self.reference_filter.confirmed_only,
            "data_key_id": data_key_id_of(self.sealed),
        }
        event = vouch(event_about(self, "upload"), LESION_IMAGES, [row | {"tag": self.sealed[-TAG_BYTES:]}])
        review = dict.fromkeys((*REVIEWS.key, *REVIEWS.columns))
        if self.impression is not None:
            review |= {
                "review_id": new_id(),
                "assessment_id": self.assessment_id,
                "clinician": self.actor,
                "request_id": self.request_id,
                "recorded_at": self.created_at,
                "impression_diagnosis": self.impression.diagnosis,
                "intended_referral": self.impression.intended_referral,
                "before_answer": True,
                "answers": [],
                "salt": uuid4(),
            }
            event = vouch(event, REVIEWS, [review])
        return review | row | event_parameters(event)


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingAssessment(AdmittedImage):
    """A claimed pending assessment with all that is needed to run it again; `attempts` counts this claim."""

    attempts: int


@dataclass(frozen=True, slots=True)
class AssessmentCounts:
    """How many assessments are pending and how many have failed; the age of the oldest pending one in seconds."""

    pending: int
    failed: int
    oldest_pending_s: float | None


@dataclass(frozen=True, slots=True)
class PreviousAssessment:
    """An earlier image of the lesion: its probabilities and risk level, its embedding in the space asked for."""

    image_id: UUID
    created_at: datetime
    probabilities: Probabilities
    embedding: Vector
    level: RiskLevel | None


@dataclass(frozen=True, slots=True)
class ImageEmbedding:
    """How far an image got, and its embedding (512,) in the space it was assessed in; None where that left none."""

    outcome: Outcome
    embedding_space: str | None
    embedding: Vector = field(repr=False)


@dataclass(frozen=True, slots=True)
class ErasureNote(Shape):
    """That the image was erased: its receipt is at `/api/lesions/{lesion_id}/images/{image_id}/receipt`."""

    receipt_id: Id
    erased_at: Time
    reason: Annotated[ErasureReason, one_of(ErasureReason, "Reason")]


@dataclass(frozen=True, slots=True)
class Identity(Shape):
    """That a clinician confirmed that the image is of this lesion."""

    confirmed_by: str
    confirmed_at: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord(ImageFacts):
    """One image and what was made of it; `assessment` is None where `outcome` is no answer.

    `failure` is the code of what made it fail; `erasure` is there once the image is not; `identity` once a
    clinician has confirmed it; `undelivered`, the code of what keeps the PMS from being told, while it does. `reviews`, in
    their order, are read with a whole timeline alone. `completed_at`: when it was answered, or found to be none that can be.
    `anatom_site_general` and `position`: as they were sent.
    """

    outcome: Outcome
    assessment: Answer
    failure: str | None = None
    erasure: ErasureNote | None = None
    identity: Identity | None = None
    undelivered: str | None = None
    completed_at: datetime | None = None
    anatom_site_general: AnatomSite | None = None
    position: BodyPosition | None = None
    reviews: tuple[Review, ...] = ()

    @property
    def risk(self) -> Risk | None:
        """What the image's answer says of it."""
        return self.assessment.risk if self.assessment else None

    @classmethod
    def of(cls, image: AdmittedImage, assessment: Assessment | None) -> ImageRecord:
        """Make one of an image just taken in, and its assessment; None: pending."""
        facts = {item.name: getattr(image, item.name) for item in fields(ImageFacts)}
        outcome = Outcome.PENDING if assessment is None else assessment.outcome
        return cls(**facts, outcome=outcome, assessment=assessment, position=image.context.position)


@dataclass(frozen=True, slots=True)
class AssessmentRecord:
    """One image, and the lesion and patient it is of."""

    lesion_id: UUID
    patient_id: str
    image: ImageRecord
    open_demand: OpenDemand | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCase:
    """What an assessment was asked and answered (`assessment` is None without an answer), without its image."""

    assessment_id: UUID
    lesion_id: UUID
    image_id: UUID
    sealed_bytes: int
    context: ClinicalContext
    top_k: int
    reference_filter: ReferenceFilter
    outcome: Outcome
    assessment: Answer


@dataclass(frozen=True, slots=True)
class LesionTimeline:
    """A lesion with its images and those of the lesions that are linked with it, newest first, and with every link of theirs.

    In a list with its own newest image alone, `linked_to` the first of those that are linked, and without what was said of it.
    (created_at, lesion_id) is the list's cursor for the lesions behind it.
    """

    lesion_id: UUID
    patient_id: str
    created_at: datetime
    images: tuple[ImageRecord, ...]
    open_demand: OpenDemand | None
    outcomes: tuple[LesionOutcome, ...] = ()
    links: tuple[LesionLink, ...] = ()
    linked_to: UUID | None = None

    @property
    def lesion_ids(self) -> tuple[UUID, ...]:
        """The lesion's own id, and those under which the other images are filed."""
        return tuple(dict.fromkeys((self.lesion_id, *(image.lesion_id for image in self.images))))

    @property
    def is_new(self) -> bool:
        """Whether it has one image, and was never linked."""
        return len(self.images) == 1 and not self.links

    @property
    def latest(self) -> ImageRecord:
        """The newest image."""
        return self.images[0]

    @classmethod
    def from_rows(cls, rows: Sequence[asyncpg.Record]) -> LesionTimeline:
        """Make one of the rows of a lesion in `timeline` or `patient_lesions`."""
        lesion = dict(rows[0])
        images = [dict(row) for row in rows]
        of = {"lesion_id": lesion["of_lesion"], "created_at": lesion["begun"]}
        return from_row(cls, lesion | of | {"images": images})


@dataclass(frozen=True, slots=True)
class SealedImageRecord:
    """A sealed image and what it is bound to."""

    patient_id: str
    content_type: str
    sealed: bytes = field(repr=False)

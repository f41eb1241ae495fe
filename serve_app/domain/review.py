"""The clinician's word on an answer, and what became of the lesion: beside the service's answer, never in its place.

Shapes are the same on the wire, on record and in memory: their docstrings and limits are the OpenAPI document's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Annotated

from serve_app.domain.assessment import Id, RiskLevel, Shape, Time, Urgency, one_of
from serve_app.domain.diagnosis import Diagnosis


class Decision(StrEnum):
    """What a clinician makes of an answer."""

    ACCEPT = "accept"
    OVERRIDE = "override"


class OverrideReason(StrEnum):
    """Why a clinician decides otherwise than the service."""

    CLINICAL_EXAMINATION = "clinical_examination"
    DERMOSCOPIC_FEATURES = "dermoscopic_features"
    PATIENT_HISTORY = "patient_history"
    KNOWN_LESION = "known_lesion"
    IMAGE_NOT_REPRESENTATIVE = "image_not_representative"
    SECOND_OPINION = "second_opinion"
    PATIENT_PREFERENCE = "patient_preference"
    OTHER = "other"


class Referral(StrEnum):
    """Whether and how fast to refer: `none`, or an urgency of the policy."""

    NONE = "none"
    ROUTINE = "routine"
    EXPEDITED = "expedited"
    URGENT = "urgent"


@dataclass(frozen=True, slots=True)
class Impression(Shape):
    """What the clinician thought of the lesion, and whether they would refer: their own, not the service's."""

    diagnosis: Annotated[Diagnosis, one_of(Diagnosis, "Diagnosis")] | None = None
    intended_referral: Annotated[Referral, one_of(Referral, "Referral")] | None = None


@dataclass(frozen=True, slots=True)
class RecordedImpression(Impression):
    """An impression on record. `before_answer`: whether it was sent before this clinician was given the answer."""

    recorded_at: Time | None = None
    before_answer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Review(Shape):
    """One word of a clinician on one assessment: an impression, a decision, or both; it changes nothing of the answer.

    `decision`: of an accepted answer, level and urgency are those that the service demanded; of an overridden one
    the clinician's, with the reason. Null where only an impression was given.
    `answers`: the assessments whose demand it closed. `follow_up_by`: when the lesion is to be seen again.
    """

    review_id: Id
    assessment_id: Id
    image_id: Id
    clinician: str
    recorded_at: Time
    decision: Annotated[Decision, one_of(Decision, "Decision")] | None
    reason: Annotated[OverrideReason, one_of(OverrideReason, "Reason")] | None
    diagnosis: Annotated[Diagnosis, one_of(Diagnosis, "Diagnosis")] | None
    level: Annotated[RiskLevel, one_of(RiskLevel, "Level")] | None
    urgency: Annotated[Urgency, one_of(Urgency, "Urgency")] | None
    referral_made: bool | None
    follow_up_by: date | None
    note: str | None
    impression: RecordedImpression | None
    answers: tuple[Id, ...]


class OutcomeKind(StrEnum):
    """How it became known what the lesion is."""

    HISTOLOGY = "histology"
    FOLLOW_UP = "follow_up"


class OutcomeSource(StrEnum):
    """Who says so."""

    PATHOLOGY_REPORT = "pathology_report"
    CLINICIAN = "clinician"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionOutcome(Shape):
    """What a lesion turned out to be; a later one adds to it and replaces nothing.

    `diagnosis` is one of the service's classes, null where none fits (`malignant` then says what is known).
    `code` is the code of the source in `code_system` (a URI), as it was sent. `observed_on`: the day of the specimen or the visit.
    `image_id`: of which image, where one was named.
    """

    outcome_id: Id
    kind: Annotated[OutcomeKind, one_of(OutcomeKind, "Kind")]
    diagnosis: Annotated[Diagnosis, one_of(Diagnosis, "Diagnosis")] | None
    malignant: bool | None
    code: str | None
    code_system: str | None
    observed_on: date
    source: Annotated[OutcomeSource, one_of(OutcomeSource, "Source")]
    image_id: Id | None
    recorded_by: str
    recorded_at: Time


class LinkReason(StrEnum):
    """Why a clinician says that two lesions are one, or that they are not."""

    CLINICAL_EXAMINATION = "clinical_examination"
    IMAGES_COMPARED = "images_compared"
    BODY_POSITION = "body_position"
    PATIENT_HISTORY = "patient_history"
    ENTERED_IN_ERROR = "entered_in_error"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class LesionLink(Shape):
    """A clinician's word that a lesion is the same as an earlier one of the patient; until it is ended, they are shown as one.

    Nothing is moved: every image stays filed where it was sent. The last three are null while the link is in force.
    """

    link_id: Id
    lesion_id: Id
    earlier_lesion_id: Id
    reason: Annotated[LinkReason, one_of(LinkReason, "LinkReason")]
    linked_by: str
    linked_at: Time
    ended_by: str | None
    ended_at: Time | None
    end_reason: Annotated[LinkReason, one_of(LinkReason, "LinkReason")] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LikeliestLesion(Shape):
    """An earlier lesion of the patient at the same site that a new one looks most like: is it the same? Nothing is linked by itself.

    `lesion_id` is the one to link to. `similarity` is the cosine of the embeddings, -1 to 1, to `image_id`, which was sent
    at `created_at`, under it or under one that is linked to it; `distance` that of their positions in one view, in shares of
    its frame, null where they do not have both.
    """

    lesion_id: Id
    image_id: Id
    created_at: Time
    similarity: float
    distance: float | None


class CardKind(StrEnum):
    """What a card of CDS Hooks is about: a demand that no clinician has answered, or a follow-up that is overdue."""

    OPEN_DEMAND = "open_demand"
    FOLLOW_UP = "follow_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFeedback(Shape):
    """What became of a card in an EHR (`client`), as that EHR says: no review, and it closes no demand.

    `review_id`: of a card about a follow-up, the review that set it. `reason_code` is one of `Reason` where `reason_system`
    is this service's, or else the EHR's own. `comment` goes with the image when that is erased.
    """

    feedback_id: Id
    card_id: Id
    client: str
    kind: Annotated[CardKind, one_of(CardKind, "CardKind")]
    assessment_id: Id
    review_id: Id | None
    outcome: str
    reason_system: str | None
    reason_code: str | None
    comment: str | None
    outcome_at: Time
    recorded_at: Time

"""The answers of the contract: what the OpenAPI document publishes beside the domain's own shapes, and how each is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any
from urllib.parse import quote
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from serve_app.domain.assessment import (
    Change,
    Classification,
    Id,
    Neighbours,
    OpenDemand,
    Outcome,
    Provenance,
    Quality,
    Reason,
    Risk,
    RiskSummary,
    SimilarCase,
    Time,
    one_of,
)
from serve_app.domain.patient import BodyPosition
from serve_app.domain.review import HookFeedback, LesionLink, LesionOutcome, LikeliestLesion, Review
from serve_app.records.lesion_rows import AssessmentRecord, ErasureNote, Identity, ImageRecord, LesionTimeline

RecordedOutcome = Annotated[Outcome, one_of(Outcome, "Outcome")]


class Document(BaseModel):
    """A shape that holds nothing but its fields; it can be made of a record with the same."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    def answer(self) -> dict[str, Any]:
        """As JSON-able values; a key that may be missing is there where it was set."""
        return self.model_dump(mode="json", exclude_unset=True)


_OF_A_CASE = tuple(each.name for each in fields(SimilarCase))


@dataclass(frozen=True, slots=True)
class Similar(SimilarCase):
    """A confirmed reference case; similarity is the cosine. `archive_url` is the archive's own page.

    `image_url` is where this service has its picture; null where it has none.
    """

    image_url: str | None
    archive_url: str

    @classmethod
    def of(cls, case: SimilarCase, pictured: Collection[str]) -> Similar:
        """Add where its picture is; `pictured` are the references of which there is one here."""
        image_url = f"/api/references/{case.isic_id}/image" if case.isic_id in pictured else None
        found: dict[str, Any] = {name: getattr(case, name) for name in _OF_A_CASE}
        return cls(**found, image_url=image_url, archive_url=archive_url(case.isic_id))


class NeighboursDocument(Document):
    """What the references say together, and the nearest of each kind.

    In an assessment: of the 16 nearest of all references, whatever was asked to be shown. In a search: of those found.
    """

    malignant_share: float | None
    nearest_benign: Similar | None
    nearest_malignant: Similar | None

    @classmethod
    def of(cls, found: Neighbours, pictured: Collection[str]) -> NeighboursDocument:
        """Leave out those that are not the nearest."""
        benign, malignant = found.nearest_benign, found.nearest_malignant
        return cls(
            malignant_share=found.malignant_share,
            nearest_benign=Similar.of(benign, pictured) if benign else None,
            nearest_malignant=Similar.of(malignant, pictured) if malignant else None,
        )


class SimilarCasesDocument(Document):
    """What a search with an assessed image found, in the space that the image was assessed in."""

    lesion_id: Id
    image_id: Id
    embedding_space: str
    similar: list[Similar]
    neighbours: NeighboursDocument


class ConfirmationDocument(Document):
    """An image of a lesion, and the word that it is."""

    lesion_id: Id
    image_id: Id
    identity: Identity


class LinksDocument(Document):
    """Where else the answer belongs: the encounter in the PMS."""

    encounter: str


class AssessmentDocument(Document):
    """The answer to one image; `erasure` is there only once the image is not, `links` where a PMS is configured.

    `undelivered` is there while the PMS is not told of it, and says why: nothing goes to an encounter that is not the
    patient's. `identity` is there once the image was confirmed; `open_demand`, the lesion's as it is now, in the 201 to an
    upload alone; `reviews`, what clinicians said of it in that order, in a timeline alone and once there is a word. `risk` is what this image
    demands, and never changes. `position` is there where it was sent; `likeliest_lesion`, in the 201 to a lesion's first image
    alone, where the patient has others at the same site: a question, to be answered by POST /api/lesions/{lesion_id}/link or not.
    """

    assessment_id: Id
    lesion_id: Id
    image_id: Id
    patient_id: str
    encounter_id: str | None
    created_at: Time
    outcome: RecordedOutcome
    reasons: list[Reason]
    quality: Quality | None
    classification: Classification | None
    risk: Risk | None
    similar: list[Similar]
    neighbours: NeighboursDocument | None
    change: Change | None
    provenance: Provenance | None
    timings_ms: Mapping[str, float]
    erasure: ErasureNote | None = None
    identity: Identity | None = None
    undelivered: Reason | None = None
    open_demand: OpenDemand | None = None
    position: BodyPosition | None = None
    likeliest_lesion: LikeliestLesion | None = None
    reviews: list[Review] | None = None
    links: LinksDocument | None = None


class TimelineDocument(Document):
    """A lesion with every image and assessment, newest first; those of the lesions that are linked with it, too.

    An assessment's `lesion_id` says where it is filed, and is the one to ask about it by. `outcomes` are what the lesion turned
    out to be, in the same order; `links`, every word that it or one of these is the same as another, ended ones too, oldest first;
    `hook_feedback`; `likeliest_lesion`, of one image that was never linked, as in the 201. The last three are there where there is any.
    """

    lesion_id: Id
    patient_id: str
    created_at: Time
    open_demand: OpenDemand | None
    outcomes: list[LesionOutcome]
    assessments: list[AssessmentDocument]
    links: list[LesionLink] = []
    likeliest_lesion: LikeliestLesion | None = None
    hook_feedback: list[HookFeedback] = []


class ReviewedDocument(Document):
    """A review, and what the lesion demands after it."""

    review: Review
    open_demand: OpenDemand | None


class LinkedDocument(Document):
    """A link as it is now, and what its lesion demands after it."""

    link: LesionLink
    open_demand: OpenDemand | None


class LatestDocument(Document):
    """A lesion's newest image."""

    image_id: Id
    assessment_id: Id
    created_at: Time
    outcome: RecordedOutcome
    risk: RiskSummary | None


class LesionSummaryDocument(Document):
    """A lesion as the patient's list shows it; `linked_to`: the earlier one that it is the same as."""

    lesion_id: Id
    linked_to: Id | None
    patient_id: str
    created_at: Time
    open_demand: OpenDemand | None
    latest: LatestDocument


class LesionListDocument(Document):
    """One page of a patient's lesions, newest first."""

    lesions: list[LesionSummaryDocument]
    next: str | None


def archive_url(isic_id: str) -> str:
    """The archive's own page of an image, for a reader who may follow it; nothing here does."""
    return f"https://api.isic-archive.com/images/{isic_id}/"


def lesion_url(lesion_id: UUID) -> str:
    """Where a lesion's timeline is."""
    return f"/api/lesions/{lesion_id}"


def encounter_url(pms_url: str, encounter_id: str) -> str:
    """Where the PMS has an encounter."""
    return f"{pms_url}/api/encounters/{quote(encounter_id, safe='')}"


def references_of(*found: ImageRecord | Neighbours) -> set[str]:
    """The isic_ids of every reference that answers made of these name."""
    parts = [part.assessment if isinstance(part, ImageRecord) else part for part in found]
    return {case.isic_id for part in parts if part is not None for case in part.cases}


_SHOWN_AS_RECORDED = ("lesion_id", "assessment_id", "image_id", "encounter_id", "created_at", "outcome")
_SHOWN_AS_FOUND = ("quality", "classification", "risk", "change", "provenance")


def assessment_document(
    record: ImageRecord,
    lesion: AssessmentRecord | LesionTimeline,
    *,
    pictured: Collection[str],
    pms_url: str | None = None,
) -> AssessmentDocument:
    """One image's answer; without one, the outcome says why, and every finding is null.

    `pictured`: which of `references_of` the record have a picture here.
    `pms_url`: the PMS's address, where one is configured, for the link to the encounter.
    """
    found = record.assessment
    weighed = found.neighbours if found else None
    optional: dict[str, Any] = {name: getattr(record, name) for name in ("erasure", "identity", "position")}
    if record.undelivered is not None:
        optional["undelivered"] = _UNDELIVERED.get(record.undelivered, _NOT_DELIVERED)
    if pms_url is not None and record.encounter_id is not None:
        optional["links"] = LinksDocument(encounter=encounter_url(pms_url, record.encounter_id))
    recorded: dict[str, Any] = {name: getattr(record, name) for name in _SHOWN_AS_RECORDED}
    shown: dict[str, Any] = {name: getattr(found, name, None) for name in _SHOWN_AS_FOUND}
    return AssessmentDocument(
        patient_id=lesion.patient_id,
        reasons=list(reasons_of(record)),
        similar=[Similar.of(case, pictured) for case in found.similar] if found else [],
        neighbours=NeighboursDocument.of(weighed, pictured) if weighed else None,
        timings_ms=found.timings_ms if found else {},
        **recorded,
        **shown,
        **{name: value for name, value in optional.items() if value is not None},
    )


def timeline_document(
    timeline: LesionTimeline, *, pictured: Collection[str], pms_url: str | None = None
) -> TimelineDocument:
    """A lesion with every image and assessment, newest first; beside it what the timeline does not hold is the caller's to add."""
    documents = []
    for record in timeline.images:
        document = assessment_document(record, timeline, pictured=pictured, pms_url=pms_url)
        if record.reviews:
            document.reviews = list(record.reviews)
        documents.append(document)
    told = TimelineDocument(
        lesion_id=timeline.lesion_id,
        patient_id=timeline.patient_id,
        created_at=timeline.created_at,
        open_demand=timeline.open_demand,
        outcomes=list(timeline.outcomes),
        assessments=documents,
    )
    if timeline.links:
        told.links = list(timeline.links)
    return told


_NEW_IMAGE = "Take a new image if the lesion is to be assessed."
_UNANSWERED = {
    Outcome.PENDING: Reason(
        "assessment_pending",
        "The image is stored; its assessment has not finished.",
        "Ask again at Location; do not send the image a second time.",
    ),
    Outcome.CANCELLED: Reason(
        "assessment_cancelled", "The image was erased before its assessment had finished.", _NEW_IMAGE
    ),
    Outcome.ERASED: Reason(
        "image_erased", "The image was erased, and with it what was found on it.", _NEW_IMAGE
    ),
}

_CHECK_IDS = (
    "Check patient and encounter. Erase an image of another patient (reason wrong_patient); send one that was filed under"
    " the wrong encounter again; where the PMS was wrong, have it mended and the message sent again."
)
#: Why the PMS was not told: by the outbox's code; any other is the last.
_UNDELIVERED = {
    "wrong_encounter": Reason(
        "wrong_encounter",
        "In the PMS the encounter is another patient's: nothing was sent to it.",
        _CHECK_IDS,
    ),
    "encounter_unknown": Reason(
        "encounter_unknown", "The PMS has no such encounter: nothing was sent to it.", _CHECK_IDS
    ),
    "encounter_not_confirmed": Reason(
        "encounter_not_confirmed",
        "The PMS has not confirmed yet that the encounter is this patient's: nothing was sent to it.",
        "Read the answer here; it is sent when the PMS confirms.",
    ),
    "said_not_delivered": Reason(
        "said_not_delivered",
        "The PMS has the answer, and did not take a review or an outcome: the encounter shows the lesion without it.",
        "Read what was said here, see that who goes by the encounter knows of it, and tell the operator.",
    ),
}
_NOT_DELIVERED = Reason(
    "not_delivered",
    "The PMS did not take the answer: it may lack in the encounter.",
    "Read the answer here, and tell the operator.",
)

#: Failure code: what it means. Other codes are ends that no version of this service has written yet.
_FAILURES = {
    "too_large": "The stored image is larger than this service takes today.",
    "image_too_small": "The stored image is smaller than this service takes today.",
    "unsupported_image": "The stored image is not of a kind that this service takes today.",
    "undecodable_image": "The stored image cannot be decoded.",
    "stage_failed": "A stage of the assessment does not answer for this image, while it does for others.",
    "internal": "The service fails on this image, while it answers others.",
    "integrity": "The stored image does not authenticate: it was altered, or its key is lost.",
}
_FAILED = "The stored image cannot be assessed."
_FAILED_ACTION = (
    "No assessment will come: judge the lesion without it, and send a new image as its follow-up."
)


def reasons_of(record: ImageRecord) -> tuple[Reason, ...]:
    """Why the outcome of an image is what it is, and what to do about it; none where it is `decided`."""
    if record.assessment is not None:
        return record.assessment.reasons
    if record.failure is not None:
        return (Reason(record.failure, _FAILURES.get(record.failure, _FAILED), _FAILED_ACTION),)
    return (_UNANSWERED[record.outcome],)

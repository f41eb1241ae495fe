"""The shapes that the OpenAPI document publishes, answers and replays; `extra="forbid"`, so tests catch any drift."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import AnatomSite, Sex

ErasureReason = Literal[
    "patient_request", "consent_withdrawn", "wrong_patient", "uploaded_in_error", "retention"
]
RecordedOutcome = Literal["decided", "review", "refused", "pending", "failed", "cancelled", "erased"]


class Document(BaseModel):
    """A shape that holds nothing but its fields."""

    model_config = ConfigDict(extra="forbid")


class ProblemDocument(Document):
    """RFC 9457; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str


class ReasonDocument(Document):
    """Why the outcome is not `decided`, and what to do about it."""

    code: str
    message: str
    action: str


class QualityDocument(Document):
    """Measured at the model's input size; width and height are the original's, in pixels.

    `colour` is 0 for grey, `two_levels` 1 for one bit, `damaged` 0 for a whole file; null in older answers.
    """

    sharpness: float
    exposure: float
    contrast: float
    dark: float
    bright: float
    width: int
    height: int
    acceptable: bool
    colour: float | None
    two_levels: float | None
    damaged: float | None


class RankedDiagnosisDocument(Document):
    """One of the three most probable."""

    diagnosis: Diagnosis
    name: str
    probability: float = Field(ge=0, le=1)


class ClassificationDocument(Document):
    """Nine calibrated probabilities that sum to 1; the set holds the truth at the stated coverage."""

    probabilities: dict[Diagnosis, float]
    top3: list[RankedDiagnosisDocument]
    prediction_set: list[Diagnosis]
    coverage: float
    ood_score: float


class FactorDocument(Document):
    """One thing that went into the risk."""

    code: str
    effect: str
    message: str


class RiskDocument(Document):
    """Level, urgency, a score from 0 to 1 and the factors behind them."""

    level: Literal["low", "medium", "high"]
    urgency: Literal["routine", "expedited", "urgent"]
    score: float = Field(ge=0, le=1)
    factors: list[FactorDocument]
    policy_version: str


class SimilarDocument(Document):
    """A confirmed reference case; similarity is the cosine. `archive_url` is the archive's own page.

    `image_url` is where this service has its picture; null where it has none.
    """

    isic_id: str
    lesion_id: str | None
    diagnosis: Diagnosis
    diagnosis_confirm_type: str | None
    similarity: float
    age_approx: int | None
    sex: str | None
    anatom_site_general: str | None
    copyright_license: str
    attribution: str
    image_url: str | None
    archive_url: str


class NeighboursDocument(Document):
    """What the references say together, and the nearest of each kind.

    In an assessment: of the 16 nearest of all references, whatever was asked to be shown. In a search: of those found.
    """

    malignant_share: float | None
    nearest_benign: SimilarDocument | None
    nearest_malignant: SimilarDocument | None


class SimilarCasesDocument(Document):
    """What a search with an assessed image found, in the space that the image was assessed in."""

    lesion_id: str
    image_id: str
    embedding_space: str
    similar: list[SimilarDocument]
    neighbours: NeighboursDocument


class ChangeDocument(Document):
    """New minus old since the lesion's previous assessed image."""

    since: str
    compared_image_id: str
    similarity: float | None
    melanoma_probability_delta: float | None


class ProvenanceDocument(Document):
    """What made the answer."""

    model_id: str
    model_digest: str
    embedding_space: str
    preprocess_version: str
    policy_version: str
    service_version: str


class ErasureNoteDocument(Document):
    """That the image was erased: its receipt is at `/api/lesions/{lesion_id}/images/{image_id}/receipt`."""

    receipt_id: str
    erased_at: str
    reason: ErasureReason


class IdentityDocument(Document):
    """That a clinician confirmed that the image is of this lesion."""

    confirmed_by: str
    confirmed_at: str


class ConfirmationDocument(Document):
    """An image of a lesion, and the word that it is."""

    lesion_id: str
    image_id: str
    identity: IdentityDocument


class OpenDemandDocument(Document):
    """The highest level and urgency that a lesion's images demand and no clinician has answered.

    `image_id` and `assessment_id` are of the first that demands the most, `since` is when it was sent. No later
    image lowers or closes it, whatever its outcome.
    """

    level: Literal["low", "medium", "high"]
    urgency: Literal["routine", "expedited", "urgent"]
    image_id: str
    assessment_id: str
    since: str


class LinksDocument(Document):
    """Where else the answer belongs: the encounter in the PMS."""

    encounter: str


class AssessmentDocument(Document):
    """The answer to one image; `erasure` is there only once the image is not, `links` where a PMS is configured.

    `identity` is there once the image was confirmed; `open_demand`, the lesion's as it is now, in the 201 to an
    upload alone. `risk` is what this image demands, and never changes.
    """

    assessment_id: str
    lesion_id: str
    image_id: str
    patient_id: str
    encounter_id: str | None
    created_at: str
    outcome: RecordedOutcome
    reasons: list[ReasonDocument]
    quality: QualityDocument | None
    classification: ClassificationDocument | None
    risk: RiskDocument | None
    similar: list[SimilarDocument]
    neighbours: NeighboursDocument | None
    change: ChangeDocument | None
    provenance: ProvenanceDocument | None
    timings_ms: dict[str, float]
    erasure: ErasureNoteDocument | None = None
    identity: IdentityDocument | None = None
    open_demand: OpenDemandDocument | None = None
    links: LinksDocument | None = None


class ErasureDocument(Document):
    """A receipt of erasure; while the key is not yet known to be gone, `erased_at` and `record_hash` are null.

    `record_hash` is the SHA-256 of the other fields (docs/erasure.md); the audit log holds it, too.
    """

    receipt_id: str
    image_id: str
    erased_at: str | None
    actor: str
    reason: ErasureReason
    ciphertext_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    data_key_id: str
    record_hash: str | None = Field(pattern="^[0-9a-f]{64}$")


class TimelineDocument(Document):
    """A lesion with every image and assessment, newest first."""

    lesion_id: str
    patient_id: str
    created_at: str
    open_demand: OpenDemandDocument | None
    assessments: list[AssessmentDocument]


class RiskSummaryDocument(Document):
    """Level and urgency alone."""

    level: Literal["low", "medium", "high"]
    urgency: Literal["routine", "expedited", "urgent"]


class LatestDocument(Document):
    """A lesion's newest image."""

    image_id: str
    assessment_id: str
    created_at: str
    outcome: RecordedOutcome
    risk: RiskSummaryDocument | None


class LesionSummaryDocument(Document):
    """A lesion as the worklist shows it."""

    lesion_id: str
    patient_id: str
    created_at: str
    open_demand: OpenDemandDocument | None
    latest: LatestDocument


class WorklistDocument(Document):
    """One page, newest first."""

    lesions: list[LesionSummaryDocument]
    next: str | None


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "content": {"application/problem+json": {}}}
    for status in (401, 403, 404, 408, 409, 410, 413, 415, 422, 429, 431, 503)
}

UPLOAD_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "patient_id"],
                "additionalProperties": False,
                "properties": {
                    "image": {"type": "string", "format": "binary", "description": "JPEG or PNG"},
                    "patient_id": {"type": "string", "description": "opaque id of the PMS"},
                    "encounter_id": {"type": "string"},
                    "lesion_id": {"type": "string", "format": "uuid", "description": "for a follow-up"},
                    "anatom_site_general": {"type": "string", "enum": list(AnatomSite)},
                    "age_approx": {"type": "integer", "minimum": 0, "maximum": 120},
                    "sex": {"type": "string", "enum": list(Sex)},
                    "history": {"type": "string", "description": "JSON object of yes/no answers"},
                    "checklist": {"type": "string", "description": "JSON object: weighted 7-point checklist"},
                },
            }
        }
    },
}


class ReplayCauseDocument(Document):
    """Why an assessment could not be replayed; `code` is stable, `message` is for people."""

    code: Literal[
        "assessment_pending",
        "assessment_failed",
        "image_erased",
        "model_gone",
        "model_changed",
        "image_rejected",
        "preprocess_changed",
        "compared_image_gone",
        "policy_changed",
    ]
    message: str


class ReplayToleranceDocument(Document):
    """How far two numbers may be apart and still count as the same, absolutely; the score is rounded."""

    probability: float
    score: float


class DifferenceDocument(Document):
    """One field that did not come out as recorded; null where one side has no such field."""

    field: str
    recorded: str | float | list[str] | None
    recomputed: str | float | list[str] | None


class ReplayNoteDocument(Document):
    """Something that is other than then without being a difference of the answer."""

    field: Literal["similar"]
    code: Literal["references_changed"]
    message: str


class ReplayProvenanceDocument(Document):
    """What made the recorded answer, and the one made again; null where there is none."""

    recorded: ProvenanceDocument | None
    current: ProvenanceDocument | None


class ReplayDocument(Document):
    """A past answer, made again: `cannot` has a cause, `within_tolerance` and `differs` have differences."""

    assessment_id: str
    verdict: Literal["identical", "within_tolerance", "differs", "cannot"]
    cause: ReplayCauseDocument | None
    tolerance: ReplayToleranceDocument
    differences: list[DifferenceDocument]
    notes: list[ReplayNoteDocument]
    provenance: ReplayProvenanceDocument

"""The shapes that the OpenAPI document publishes; `extra="forbid"`, so tests catch any drift."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import AnatomSite, Sex


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProblemDocument(_Document):
    """RFC 9457; `code` is stable, `detail` is for people."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str


class ReasonDocument(_Document):
    """Why the outcome is not `decided`, and what to do about it."""

    code: str
    message: str
    action: str


class QualityDocument(_Document):
    """Measured at the model's input size; width and height are the original's, in pixels."""

    sharpness: float
    exposure: float
    contrast: float
    dark: float
    bright: float
    width: int
    height: int
    acceptable: bool


class RankedDiagnosisDocument(_Document):
    """One of the three most probable."""

    diagnosis: Diagnosis
    name: str
    probability: float = Field(ge=0, le=1)


class ClassificationDocument(_Document):
    """Nine calibrated probabilities that sum to 1; the set holds the truth at the stated coverage."""

    probabilities: dict[Diagnosis, float]
    top3: list[RankedDiagnosisDocument]
    prediction_set: list[Diagnosis]
    coverage: float
    ood_score: float


class FactorDocument(_Document):
    """One thing that went into the risk."""

    code: str
    effect: str
    message: str


class RiskDocument(_Document):
    """Level, urgency, a score from 0 to 1 and the factors behind them."""

    level: Literal["low", "medium", "high"]
    urgency: Literal["routine", "expedited", "urgent"]
    score: float = Field(ge=0, le=1)
    factors: list[FactorDocument]
    policy_version: str


class SimilarDocument(_Document):
    """A confirmed reference case; similarity is the cosine. `image_url` is here, `archive_url` the archive's page."""

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
    image_url: str
    archive_url: str


class NeighboursDocument(_Document):
    """The references together; nearest of each kind wherever the cache holds one."""

    malignant_share: float | None
    nearest_benign: SimilarDocument | None
    nearest_malignant: SimilarDocument | None


class ChangeDocument(_Document):
    """New minus old since the lesion's previous assessed image."""

    since: str
    compared_image_id: str
    similarity: float | None
    melanoma_probability_delta: float | None


class ProvenanceDocument(_Document):
    """What made the answer."""

    model_id: str
    model_digest: str
    embedding_space: str
    preprocess_version: str
    policy_version: str
    service_version: str


class AssessmentDocument(_Document):
    """The answer to one image."""

    assessment_id: str
    lesion_id: str
    image_id: str
    patient_id: str
    encounter_id: str | None
    created_at: str
    outcome: Literal["decided", "review", "refused", "pending"]
    reasons: list[ReasonDocument]
    quality: QualityDocument | None
    classification: ClassificationDocument | None
    risk: RiskDocument | None
    similar: list[SimilarDocument]
    neighbours: NeighboursDocument | None
    change: ChangeDocument | None
    provenance: ProvenanceDocument | None
    timings_ms: dict[str, float]


class TimelineDocument(_Document):
    """A lesion with every image and assessment, newest first."""

    lesion_id: str
    patient_id: str
    created_at: str
    assessments: list[AssessmentDocument]


class RiskSummaryDocument(_Document):
    """Level and urgency alone."""

    level: Literal["low", "medium", "high"]
    urgency: Literal["routine", "expedited", "urgent"]


class LatestDocument(_Document):
    """A lesion's newest image."""

    image_id: str
    assessment_id: str
    created_at: str
    outcome: Literal["decided", "review", "refused", "pending"]
    risk: RiskSummaryDocument | None


class LesionSummaryDocument(_Document):
    """A lesion as the worklist shows it."""

    lesion_id: str
    patient_id: str
    created_at: str
    latest: LatestDocument


class WorklistDocument(_Document):
    """One page, newest first."""

    lesions: list[LesionSummaryDocument]
    next: str | None


class ReplayCauseDocument(_Document):
    """Why an assessment could not be replayed; `code` is stable, `message` is for people."""

    code: Literal[
        "assessment_pending",
        "model_gone",
        "model_changed",
        "image_rejected",
        "preprocess_changed",
        "compared_image_gone",
        "policy_changed",
    ]
    message: str


class ReplayToleranceDocument(_Document):
    """How far two numbers may be apart and still count as the same, absolutely; the score is rounded."""

    probability: float
    score: float


class DifferenceDocument(_Document):
    """One field that did not come out as recorded; null where one side has no such field."""

    field: str
    recorded: str | float | list[str] | None
    recomputed: str | float | list[str] | None


class ReplayNoteDocument(_Document):
    """Something that is other than then without being a difference of the answer."""

    field: Literal["similar"]
    code: Literal["references_changed"]
    message: str


class ReplayProvenanceDocument(_Document):
    """What made the recorded answer, and the one made again; null where there is none."""

    recorded: ProvenanceDocument | None
    current: ProvenanceDocument | None


class ReplayDocument(_Document):
    """A past answer, made again: `cannot` has a cause, `within_tolerance` and `differs` have differences."""

    assessment_id: str
    verdict: Literal["identical", "within_tolerance", "differs", "cannot"]
    cause: ReplayCauseDocument | None
    tolerance: ReplayToleranceDocument
    differences: list[DifferenceDocument]
    notes: list[ReplayNoteDocument]
    provenance: ReplayProvenanceDocument


PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDocument, "content": {"application/problem+json": {}}}
    for status in (401, 403, 404, 409, 413, 415, 422, 429, 503)
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

"""The answer: what each stage found, and what was concluded from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from serve_app.domain.diagnosis import Diagnosis


class Outcome(StrEnum):
    """How far the service goes for this image; only the first three come with an assessment.

    FAILED: it can never be assessed. CANCELLED: erased while it was pending. ERASED: after it was answered.
    """

    DECIDED = "decided"
    REVIEW = "review"
    REFUSED = "refused"
    PENDING = "pending"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ERASED = "erased"


class RiskLevel(StrEnum):
    """Risk, lowest first."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


class Urgency(StrEnum):
    """Referral urgency, least urgent first."""

    ROUTINE = "routine"
    EXPEDITED = "expedited"
    URGENT = "urgent"


#: Code of the reason by which the clinician's checklist demands a referral that the image gives no answer to.
CHECKLIST_REFERS = "checklist_demands_referral"
#: Code of the reason by which an image is questioned: it is not its lesion's own until a clinician confirms it.
ANOTHER_LESION = "perhaps_another_lesion"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an outcome is not `decided`, and what the clinician can do about it."""

    code: str
    message: str
    action: str


@dataclass(frozen=True, slots=True)
class Quality:
    """Image quality at the model's input size; width and height of the upright original in pixels.

    The last three are None in answers from before they were measured.
    """

    sharpness: float
    exposure: float
    contrast: float
    dark: float
    bright: float
    width: int
    height: int
    acceptable: bool
    colour: float | None = None
    two_levels: float | None = None
    damaged: float | None = None


@dataclass(frozen=True, slots=True)
class Classification:
    """Calibrated probabilities over the nine (summing to 1), and the conformal set of the eight.

    ood_score is the out-of-distribution distance that p(UNK) was calibrated from.
    """

    probabilities: Mapping[Diagnosis, float]
    prediction_set: tuple[Diagnosis, ...]
    coverage: float
    ood_score: float

    @property
    def top3(self) -> tuple[Diagnosis, ...]:
        """The three most probable, most probable first."""
        return tuple(sorted(self.probabilities, key=lambda d: -self.probabilities[d])[:3])


@dataclass(frozen=True, slots=True)
class SimilarCase:
    """A confirmed reference image; similarity is the cosine, -1 to 1."""

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


#: How many of the nearest references the risk and the doubts weigh, of all that there are: fixed, because the
#: policies' limits on their malignant share hold for a share of so many, and no caller may move it.
WEIGHED = 16


@dataclass(frozen=True, slots=True)
class Neighbours:
    """What the nearest references say together.

    malignant_share is over those in `similar`; nearest_benign and nearest_malignant are searched
    for on their own, so each is there whenever the cache holds one.
    """

    similar: tuple[SimilarCase, ...]
    malignant_share: float | None
    nearest_benign: SimilarCase | None
    nearest_malignant: SimilarCase | None


@dataclass(frozen=True, slots=True)
class Factor:
    """One thing that went into the risk; effect is what it did to it."""

    code: str
    effect: str
    message: str


@dataclass(frozen=True, slots=True)
class Risk:
    """Risk level and referral urgency, a score of 0 to 1 and the factors behind it."""

    level: RiskLevel
    urgency: Urgency
    score: float
    factors: tuple[Factor, ...]
    policy_version: str


@dataclass(frozen=True, slots=True)
class Change:
    """What moved since the lesion's previous assessed image: differences are new minus old."""

    since: str
    compared_image_id: str
    similarity: float | None
    melanoma_probability_delta: float | None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that made this answer, enough to make it again."""

    model_id: str
    model_digest: str
    embedding_space: str
    preprocess_version: str
    policy_version: str
    service_version: str


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What the risk stage concludes from all the others."""

    outcome: Outcome
    reasons: tuple[Reason, ...]
    quality: Quality
    risk: Risk | None
    policy_version: str


@dataclass(frozen=True, slots=True)
class Assessment:
    """One finished answer to one image. A refused image has no classification, risk or neighbours.

    `neighbours` are the WEIGHED nearest of all references: what the risk was drawn from. `similar` are those that
    the caller asked to be shown; no conclusion rests on them.
    """

    outcome: Outcome
    reasons: tuple[Reason, ...]
    quality: Quality
    classification: Classification | None
    risk: Risk | None
    neighbours: Neighbours | None
    similar: tuple[SimilarCase, ...]
    change: Change | None
    provenance: Provenance
    embedding: NDArray[np.float32] | None
    timings_ms: Mapping[str, float]

    @property
    def demand(self) -> tuple[RiskLevel, Urgency] | None:
        """What the rules demand for this image: its risk, or of a refused image what its checklist demands."""
        if self.risk is not None:
            return self.risk.level, self.risk.urgency
        refers = any(reason.code == CHECKLIST_REFERS for reason in self.reasons)
        return (RiskLevel.HIGH, Urgency.URGENT) if refers else None


@dataclass(frozen=True, slots=True)
class ReferenceFilter:
    """Limits of a search, all of which hold; without any, every reference may be found.

    `licences` and `sites` (anatom_site_general) are in the archive's words, empty for any.
    `confirmed_only`: the archive must say how the diagnosis was confirmed (diagnosis_confirm_type).
    `diagnoses`: empty for any. A filter limits what is shown, never what an assessment weighs: the risk is drawn
    from the nearest of all references, and a malignant one that is hidden could lower it.
    """

    licences: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    confirmed_only: bool = False
    diagnoses: tuple[Diagnosis, ...] = ()

    def __bool__(self) -> bool:
        """Whether it limits anything."""
        return bool(self.licences or self.sites or self.confirmed_only or self.diagnoses)


EVERY_REFERENCE = ReferenceFilter()

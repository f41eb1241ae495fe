"""The answer: what each stage found, and what was concluded from it.

Shapes are the same on the wire, on record and in memory: their docstrings and limits are the OpenAPI document's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
import inspect
from typing import Annotated, Any, ClassVar
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, PlainSerializer, WithJsonSchema, computed_field

from serve_app.domain.diagnosis import Diagnosis


def _describe(schema: dict[str, Any], shape: type) -> None:
    schema["description"] = inspect.cleandoc(shape.__doc__ or "")


def _state(schema: dict[str, Any]) -> None:
    """A field like the others: that it is computed is nothing to its reader."""
    del schema["readOnly"], schema["description"]


class Shape:
    """What one adapter reads from JSON and writes to it, and the OpenAPI document shows; it holds nothing but its fields."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "json_schema_extra": _describe}


def format_time(moment: datetime, timespec: str = "milliseconds") -> str:
    """RFC 3339 in UTC; a receipt's record hash has all six places (`microseconds`)."""
    return moment.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def one_of(words: type[StrEnum], title: str) -> WithJsonSchema:
    """Have the OpenAPI document list an enumeration's words where they are used."""
    return WithJsonSchema({"type": "string", "enum": list(words), "title": title})


#: As they are written in JSON.
Id = Annotated[UUID, PlainSerializer(str, return_type=str)]
Time = Annotated[datetime, PlainSerializer(format_time, return_type=str)]
Share = Annotated[float, Field(ge=0, le=1)]


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


@dataclass(frozen=True, slots=True)
class Reason(Shape):
    """Why the outcome is not `decided`, and what to do about it."""

    code: str
    message: str
    action: str


#: Code of the reason by which the clinician's checklist demands a referral that the image gives no answer to.
CHECKLIST_REFERS = "checklist_demands_referral"
#: Code of the reason by which an image is questioned: it is not its lesion's own until a clinician confirms it.
ANOTHER_LESION = "perhaps_another_lesion"


@dataclass(frozen=True, slots=True)
class QualityMeasures:
    """What can be said of an image without a model.

    sharpness  variance of the 4-neighbour Laplacian of luma (0-255 scale), the focus measure
               of Pech-Pacheco et al., ICPR 2000
    exposure   mean luma, 0 (black) to 1 (white)
    contrast   standard deviation of luma, 0 to 0.5
    dark       share of pixels under 5 % of full scale
    bright     share of pixels over 95 % of full scale
    colour     how far colours differ that have the same luma: the RMS distance of (B - luma, R - luma) from
               the best cubic polynomial of luma, 0-255 scale. 0 for grey, and near it for grey in any tint
    two_levels share of pixels in the two most frequent levels of brightness of the file; 1 for one bit
    damaged    share of the picture that a damaged file lacks; 0 for a whole one
    red, blue  natural logarithm of mean red over mean green, and of mean blue over mean green: the colour balance,
               which goes with the camera and its light more than with the skin
    """

    sharpness: float
    exposure: float
    contrast: float
    dark: float
    bright: float
    colour: float
    two_levels: float
    damaged: float
    red: float = 0.0
    blue: float = 0.0


@dataclass(frozen=True, slots=True)
class Quality(Shape):
    """Measured at the model's input size; width and height are the original's, in pixels.

    `colour` is 0 for grey, `two_levels` 1 for one bit, `damaged` 0 for a whole file, `red` and `blue` the logarithms
    of their means over that of green; null in older answers.
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
    red: float | None = None
    blue: float | None = None


@dataclass(frozen=True, slots=True)
class RankedDiagnosis(Shape):
    """One of the three most probable."""

    diagnosis: Diagnosis
    name: str
    probability: Share


def _in_order(probabilities: Mapping[Diagnosis, float]) -> Mapping[Diagnosis, float]:
    """The database keeps keys by their length: put them in the order of the diagnoses."""
    return {diagnosis: probabilities[diagnosis] for diagnosis in Diagnosis if diagnosis in probabilities}


Probabilities = Annotated[Mapping[Diagnosis, float], AfterValidator(_in_order)]


@dataclass(frozen=True, slots=True)
class Classification(Shape):
    """Nine calibrated probabilities that sum to 1; the set holds the truth at the stated coverage.

    `disagreement` is how far the networks of an ensemble are apart, 0 to 1; null of a single one, and in older answers.
    """

    probabilities: Probabilities
    prediction_set: tuple[Diagnosis, ...]
    coverage: float
    #: The out-of-distribution distance that p(UNK) was calibrated from.
    ood_score: float
    #: The members' mean total variation distance to their mean.
    disagreement: float | None = None

    @computed_field(json_schema_extra=_state)  # type: ignore[prop-decorator]
    @property
    def top3(self) -> tuple[RankedDiagnosis, ...]:
        """The three most probable, most probable first."""
        ranked = sorted(self.probabilities.items(), key=lambda item: -item[1])[:3]
        return tuple(RankedDiagnosis(d, d.display_name, probability) for d, probability in ranked)


@dataclass(frozen=True, slots=True)
class SimilarCase(Shape):
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
class Neighbours(Shape):
    """What the nearest references say together.

    malignant_share is over those in `similar`; nearest_benign and nearest_malignant are searched
    for on their own, so each is there whenever the cache holds one.
    """

    similar: tuple[SimilarCase, ...]
    malignant_share: float | None
    nearest_benign: SimilarCase | None
    nearest_malignant: SimilarCase | None

    @property
    def nearest(self) -> tuple[SimilarCase, ...]:
        """The nearest of each kind, as far as there is one."""
        return tuple(case for case in (self.nearest_benign, self.nearest_malignant) if case is not None)

    @property
    def cases(self) -> tuple[SimilarCase, ...]:
        """All of them."""
        return self.similar + self.nearest


@dataclass(frozen=True, slots=True)
class Factor(Shape):
    """One thing that went into the risk."""

    code: str
    effect: str
    message: str


@dataclass(frozen=True, slots=True)
class RiskSummary(Shape):
    """Level and urgency alone."""

    level: Annotated[RiskLevel, one_of(RiskLevel, "Level")]
    urgency: Annotated[Urgency, one_of(Urgency, "Urgency")]


@dataclass(frozen=True, slots=True)
class Risk(RiskSummary):
    """Level, urgency, a score from 0 to 1 and the factors behind them."""

    score: Share
    factors: tuple[Factor, ...]
    policy_version: str


@dataclass(frozen=True, slots=True)
class OpenDemand(RiskSummary):
    """The highest level and urgency that a lesion's images demand and no clinician has answered.

    `image_id` and `assessment_id` are of the first that demands the most, `since` is when it was sent. No later
    image lowers or closes it, whatever its outcome. `lesion_id`: where that image is filed, and is decided on, if that is under
    another lesion that is linked with this one, or was; left out else.
    """

    image_id: Id
    assessment_id: Id
    since: Time
    lesion_id: Annotated[Id | None, Field(exclude_if=lambda value: value is None)] = None


@dataclass(frozen=True, slots=True)
class Change(Shape):
    """New minus old since the lesion's previous assessed image."""

    since: str
    compared_image_id: str
    similarity: float | None
    melanoma_probability_delta: float | None


@dataclass(frozen=True, slots=True)
class Provenance(Shape):
    """What made the answer."""

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

    __pydantic_config__: ClassVar[dict[str, Any]] = {"arbitrary_types_allowed": True}

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
    def cases(self) -> tuple[SimilarCase, ...]:
        """Every reference that its answer names."""
        return self.similar + (self.neighbours.nearest if self.neighbours else ())

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

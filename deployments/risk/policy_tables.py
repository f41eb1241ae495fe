"""The tables of a policy file as types: one class a table, one field a key.

What each number means and where it comes from stands in the file itself, beside the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite

#: A number from 0 to 1; the reader checks it.
Share = Annotated[float, "0 to 1"]
#: A probability, or the name of an operating point in the model's manifest.
Threshold = Share | str


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """The range of each quality measure; an image beyond any of them is named for it."""

    min_sharpness: float
    min_exposure: Share
    max_exposure: Share
    min_contrast: Share
    max_dark: Share
    max_bright: Share
    min_colour: float
    max_two_levels: Share
    max_damaged: Share


@dataclass(frozen=True, slots=True)
class QualityPolicy:
    """Beyond `hard` an image is refused, beyond `soft` reviewed; measured at `input_side` pixels."""

    input_side: int
    hard: QualityLimits
    soft: QualityLimits


@dataclass(frozen=True, slots=True)
class RefusalPolicy:
    """When the model's own doubt leaves no answer."""

    max_unknown: Share


@dataclass(frozen=True, slots=True)
class ReviewPolicy:
    """When a clinician must look before the answer is used."""

    max_unknown: Share
    max_set_size: int
    min_margin: Share
    neighbours_malignant: Share
    neighbours_benign: Share
    melanoma_in_set: bool
    unfamiliar_sites: tuple[AnatomSite, ...]
    same_lesion: Share
    same_lesion_if_lower: Share


@dataclass(frozen=True, slots=True)
class ChecklistRule:
    """The weighted 7-point checklist, in points."""

    refer_at: int
    level: RiskLevel
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class ProbabilityRule:
    """What the probability of a diagnosis, or of a more serious one, demands."""

    threshold: Threshold
    level: RiskLevel
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class PlausibleRule:
    """What a melanoma below its threshold demands, from `fraction` of the threshold on."""

    fraction: Share
    level: RiskLevel
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class BccRule:
    """Basal cell carcinoma, more urgent where delay does harm."""

    threshold: Threshold
    level: RiskLevel
    urgency: Urgency
    delay_harmful_sites: tuple[AnatomSite, ...]
    delay_harmful_urgency: Urgency


@dataclass(frozen=True, slots=True)
class AkRule:
    """Actinic keratosis, more urgent under immunosuppression."""

    threshold: Threshold
    level: RiskLevel
    urgency: Urgency
    immunosuppressed_urgency: Urgency


@dataclass(frozen=True, slots=True)
class NeighboursRule:
    """What the share of malignant neighbours demands."""

    malignant_share: Share
    level: RiskLevel
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class ChangeRule:
    """What a rise of the melanoma probability since the last image demands."""

    melanoma_rise: Share
    level: RiskLevel
    urgency: Urgency


@dataclass(frozen=True, slots=True)
class Rules:
    """Each sets the least level and urgency."""

    checklist: ChecklistRule
    melanoma: ProbabilityRule
    melanoma_plausible: PlausibleRule
    scc: ProbabilityRule
    bcc: BccRule
    ak: AkRule
    unknown: ProbabilityRule
    neighbours: NeighboursRule
    change: ChangeRule


@dataclass(frozen=True, slots=True)
class SeverityWeights:
    """Harm of a missed diagnosis, on the scale of a missed melanoma."""

    mel: Share
    scc: Share
    bcc: Share
    ak: Share
    unk: Share


@dataclass(frozen=True, slots=True)
class Raises:
    """By how much each finding takes the score towards 1."""

    age: Share
    head_neck: Share
    personal_melanoma: Share
    personal_skin_cancer: Share
    family_melanoma: Share
    immunosuppression: Share
    checklist_point: Share
    neighbours: Share
    nearest_malignant: Share
    appearance_change: Share


@dataclass(frozen=True, slots=True)
class ScoreLimits:
    """From where a finding counts: years, and cosines."""

    age: int
    similarity_lead: Share
    min_similarity: Share


@dataclass(frozen=True, slots=True)
class Bands:
    """The least score of each level."""

    medium: Share
    high: Share
    high_urgency: Urgency


@dataclass(frozen=True, slots=True)
class ScorePolicy:
    """How the score is made and read."""

    severity: SeverityWeights
    raises: Raises
    limits: ScoreLimits
    bands: Bands

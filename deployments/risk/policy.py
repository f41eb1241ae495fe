"""One whole risk policy: its tables as types, read strictly from disk, overridden by `user_config`, never contradictory."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
import json
from pathlib import Path
import tomllib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from pydantic_core import ErrorDetails

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite

Share = Annotated[float, Field(ge=0, le=1)]
#: A probability, or the name of an operating point in the model's manifest.
Threshold = Share | str
# TOML and JSON have words for these.
Soonest = Annotated[Urgency, Field(strict=False)]
Sites = Annotated[tuple[Annotated[AnatomSite, Field(strict=False)], ...], Field(strict=False)]


class Table(BaseModel):
    """A table of the policy: all of its keys and no other; an integer passes for a float, a boolean for nothing else."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class QualityLimits(Table):
    """The range of each quality measure; an image beyond any of them is named for it."""

    min_sharpness: FiniteFloat
    min_exposure: Share
    max_exposure: Share
    min_contrast: Share
    max_dark: Share
    max_bright: Share
    min_colour: FiniteFloat
    max_two_levels: Share
    max_damaged: Share


class QualityPolicy(Table):
    """Beyond `hard` an image is refused, beyond `soft` reviewed; measured at `input_side` pixels."""

    input_side: int
    hard: QualityLimits
    soft: QualityLimits


class RefusalPolicy(Table):
    """When the model's own doubt leaves no answer."""

    max_unknown: Share


class ReviewPolicy(Table):
    """When a clinician must look before the answer is used."""

    max_unknown: Share
    max_set_size: int
    min_margin: Share
    neighbours_malignant: Share
    neighbours_benign: Share
    melanoma_in_set: bool
    unfamiliar_sites: Sites
    same_lesion: Share
    same_lesion_if_lower: Share


class Demand(Table):
    """The least level and urgency that a rule sets."""

    level: Annotated[RiskLevel, Field(strict=False)]
    urgency: Soonest


class ChecklistRule(Demand):
    """The weighted 7-point checklist, in points."""

    refer_at: int


class ProbabilityRule(Demand):
    """What the probability of a diagnosis, or of a more serious one, demands."""

    threshold: Threshold


class PlausibleRule(Demand):
    """What a melanoma below its threshold demands, from `fraction` of the threshold on."""

    fraction: Share


class BccRule(ProbabilityRule):
    """Basal cell carcinoma, more urgent where delay does harm."""

    delay_harmful_sites: Sites
    delay_harmful_urgency: Soonest


class AkRule(ProbabilityRule):
    """Actinic keratosis, more urgent under immunosuppression."""

    immunosuppressed_urgency: Soonest


class NeighboursRule(Demand):
    """What the share of malignant neighbours demands."""

    malignant_share: Share


class ChangeRule(Demand):
    """What a rise of the melanoma probability since the last image demands."""

    melanoma_rise: Share


class Rules(Table):
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


class SeverityWeights(Table):
    """Harm of a missed diagnosis, on the scale of a missed melanoma."""

    mel: Share
    scc: Share
    bcc: Share
    ak: Share
    unk: Share


class Raises(Table):
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


class ScoreLimits(Table):
    """From where a finding counts: years, and cosines."""

    age: int
    similarity_lead: Share
    min_similarity: Share


class Bands(Table):
    """The least score of each level."""

    medium: Share
    high: Share
    high_urgency: Soonest


class ScorePolicy(Table):
    """How the score is made and read."""

    severity: SeverityWeights
    raises: Raises
    limits: ScoreLimits
    bands: Bands


class RiskPolicy(Table):
    """One whole policy; `version` is what an answer names as `policy_version`."""

    version: str
    quality: QualityPolicy
    refusal: RefusalPolicy
    review: ReviewPolicy
    rules: Rules
    score: ScorePolicy


NG12_REFER_AT = 3


class PolicyError(ValueError):
    """The risk policy is not valid."""


def read_table(raw: Mapping[str, Any]) -> RiskPolicy:
    """Make a policy of its tables.

    Raises PolicyError, naming the key, for one that is missing, unknown or of the wrong kind, and for a policy that
    contradicts itself or weakens what a guideline demands.
    """
    try:
        policy = RiskPolicy.model_validate(raw)
    except ValidationError as error:
        raise PolicyError(" ".join(map(_fault, error.errors()))) from None
    if problems := [problem for problem, kept in _consistency(policy).items() if not kept]:
        raise PolicyError(f"Policy {policy.version}: {'; '.join(problems)}.")
    return policy


def _fault(error: ErrorDetails) -> str:
    key = ".".join(map(str, error["loc"]))
    kinds = {
        "missing": f"Missing from the risk policy: {key}.",
        "extra_forbidden": f"Unknown in the risk policy: {key}.",
    }
    return kinds.get(error["type"], f"{key} cannot be {error['input']!r}: {error['msg']}.")


def _consistency(policy: RiskPolicy) -> dict[str, bool]:
    hard, soft, severity = policy.quality.hard, policy.quality.soft, policy.score.severity
    limits = [(name, getattr(soft, name), limit) for name, limit in hard]
    checklist, bands, unknown = policy.rules.checklist, policy.score.bands, policy.rules.unknown.threshold
    return {
        f"rules.checklist.refer_at must be 1 to {NG12_REFER_AT} (NICE NG12)": (
            1 <= checklist.refer_at <= NG12_REFER_AT
        ),
        "rules.checklist must demand high and urgent (NICE NG12)": (
            checklist.level is RiskLevel.HIGH and checklist.urgency is Urgency.URGENT
        ),
        "quality.soft must lie within quality.hard": (
            all(s <= h if name.startswith("max_") else s >= h for name, s, h in limits)
            and min(hard.min_sharpness, hard.min_colour) >= 0
        ),
        "review.max_unknown must not exceed refusal.max_unknown": (
            policy.review.max_unknown <= policy.refusal.max_unknown
        ),
        "review.same_lesion must not exceed review.same_lesion_if_lower": (
            policy.review.same_lesion <= policy.review.same_lesion_if_lower
        ),
        "rules.unknown.threshold must be a number, at most review.max_unknown": (
            not isinstance(unknown, str) and unknown <= policy.review.max_unknown
        ),
        "score.severity must fall from mel over scc and bcc to ak, and unk must not exceed mel": (
            severity.mel >= severity.scc >= severity.bcc >= severity.ak and severity.unk <= severity.mel
        ),
        "score.bands.medium must be above 0 and below high": 0 < bands.medium < bands.high,
        "review.max_set_size must be at least 1": policy.review.max_set_size >= 1,
    }


POLICIES = Path(__file__).resolve().parent / "policies"
CURRENT_VERSION = "2026-11.4"
#: What some policies are older than, with values that ask nothing; they have answered, and are never edited.
_LATER_LIMITS = {"min_colour": 0.0, "max_two_levels": 1.0, "max_damaged": 1.0}
_LATER = {
    "quality": {"hard": _LATER_LIMITS, "soft": _LATER_LIMITS},
    "review": {"same_lesion": 0.0, "same_lesion_if_lower": 0.0},
}
_OLDER_VERSIONS = frozenset({"2026-11.2", "2026-11.3"})


def merge_tables(table: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Lay overrides over a table, key by key; what is not a key of it is left for the reader to refuse."""
    merged = dict(table)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(table.get(key), Mapping)
        merged[key] = merge_tables(table[key], value) if both else value
    return merged


def read_policy(version: str = CURRENT_VERSION, *, folder: Path = POLICIES) -> RiskPolicy:
    """Read `folder/<version>.toml`.

    Raises PolicyError, naming the key, for one that is missing, unknown or of the wrong kind.
    """
    path = folder / f"{version}.toml"
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise PolicyError(f"There is no risk policy {path}.") from error
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{path} is not TOML: {error}.") from error
    policy = read_table(merge_tables(_LATER, raw) if version in _OLDER_VERSIONS else raw)
    if policy.version != version:
        raise PolicyError(f"{path} calls itself {policy.version!r}.")
    return policy


def with_overrides(policy: RiskPolicy, overrides: Mapping[str, Any]) -> RiskPolicy:
    """Change some keys, nested as in the file: `{"review": {"min_margin": 0.15}}`.

    The version then ends in `+` and 8 hex digits over everything the policy holds, so that
    an answer names exactly the numbers that made it: the same numbers, the same version.
    Nothing changed, the version stays. Raises PolicyError for an unknown key, a wrong value,
    or a policy that contradicts itself or a guideline.
    """
    if "version" in overrides:
        raise PolicyError("version cannot be overridden.")
    shipped = policy.model_dump(mode="json")
    changed = read_table(merge_tables(shipped, overrides))
    if changed == policy:
        return policy
    return changed.model_copy(
        update={"version": f"{policy.version.partition('+')[0]}+{digest_numbers(changed)}"}
    )


def digest_numbers(policy: RiskPolicy) -> str:
    """8 hex digits over everything the policy holds but its version."""
    return _digest(policy.model_dump(mode="json", exclude={"version"}))


def at_site(policy: RiskPolicy, operating_points: Mapping[str, float]) -> RiskPolicy:
    """Name a policy after the operating points that a site has set: its version ends in what `site_mark` gives."""
    if not operating_points:
        return policy
    return policy.model_copy(update={"version": policy.version + site_mark(operating_points)})


def site_mark(operating_points: Mapping[str, float]) -> str:
    """`.site-` and 8 hex digits over the site's operating points: the same numbers, the same mark."""
    return f".site-{_digest(dict(operating_points))}"


def _digest(numbers: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:8]

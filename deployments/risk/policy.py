"""One whole risk policy: its tables as types, read strictly from disk, overridden by `user_config`, never contradictory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
import hashlib
import json
import math
from pathlib import Path
import tomllib
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite

T = TypeVar("T")


class PolicyError(ValueError):
    """The risk policy is not valid."""


def merge_tables(table: Mapping[str, Any], overrides: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Lay overrides over a table, key by key; what is not a key of it is left for the reader to refuse."""
    merged = dict(table)
    for key, value in overrides.items():
        old = table.get(key)
        if isinstance(old, Mapping):
            if not isinstance(value, Mapping):
                raise PolicyError(f"{place}{key} is a table, not {value!r}.")
            merged[key] = merge_tables(old, value, f"{place}{key}.")
        else:
            merged[key] = value
    return merged


def read_table(kind: type[T], raw: object, place: str = "") -> T:
    """Read a table into a dataclass, tables in it into theirs.

    Raises PolicyError, naming the key, for one that is missing, unknown or of the wrong kind.
    """
    if not isinstance(raw, Mapping):
        raise PolicyError(f"{place.rstrip('.')} is a table, not {raw!r}.")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := sorted(str(key) for key in raw if key not in names):
        raise PolicyError(f"Unknown in the risk policy: {', '.join(place + key for key in unknown)}.")
    if missing := [name for name in names if name not in raw]:
        raise PolicyError(f"Missing from the risk policy: {', '.join(place + name for name in missing)}.")
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: _value(hints[name], raw[name], place + name) for name in names})


def _value(kind: object, raw: object, key: str) -> object:
    """Check one value against its annotation; an integer passes for a float, a boolean for nothing else."""
    if isinstance(kind, type) and is_dataclass(kind):
        return read_table(kind, raw, f"{key}.")
    if str in get_args(kind):  # a number, or a name
        kind = str if isinstance(raw, str) else get_args(kind)[0]
    if get_origin(kind) is tuple and isinstance(raw, list | tuple):
        return tuple(_value(get_args(kind)[0], item, key) for item in raw)
    if get_origin(kind) is Annotated:
        return _share(raw, key)
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(raw, str) and raw in list(kind):
        return kind(raw)
    if kind is float:
        return _number(raw, key)
    if kind in {int, bool, str} and type(raw) is kind:
        return raw
    raise PolicyError(f"{key} cannot be {raw!r}.")


def _share(raw: object, key: str) -> float:
    number = _number(raw, key)
    if not 0.0 <= number <= 1.0:
        raise PolicyError(f"{key} must be from 0 to 1, not {raw!r}.")
    return number


def _number(raw: object, key: str) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
        raise PolicyError(f"{key} must be a number, not {raw!r}.")
    return float(raw)


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


NG12_REFER_AT = 3


@dataclass(frozen=True, slots=True)
class RiskPolicy:
    """One whole policy; `version` is what an answer names as `policy_version`."""

    version: str
    quality: QualityPolicy
    refusal: RefusalPolicy
    review: ReviewPolicy
    rules: Rules
    score: ScorePolicy

    def __post_init__(self) -> None:
        """Refuse a policy that contradicts itself or weakens what a guideline demands."""
        if problems := _problems(self):
            raise PolicyError(f"Policy {self.version}: {'; '.join(problems)}.")


def _problems(policy: RiskPolicy) -> list[str]:
    hard, soft, severity = policy.quality.hard, policy.quality.soft, policy.score.severity
    checks = {
        f"rules.checklist.refer_at must be 1 to {NG12_REFER_AT} (NICE NG12)": (
            1 <= policy.rules.checklist.refer_at <= NG12_REFER_AT
        ),
        "rules.checklist must demand high and urgent (NICE NG12)": (
            policy.rules.checklist.level is RiskLevel.HIGH
            and policy.rules.checklist.urgency is Urgency.URGENT
        ),
        "quality.soft must lie within quality.hard": (
            soft.min_sharpness >= hard.min_sharpness >= 0
            and soft.min_exposure >= hard.min_exposure
            and soft.max_exposure <= hard.max_exposure
            and soft.min_contrast >= hard.min_contrast
            and soft.max_dark <= hard.max_dark
            and soft.max_bright <= hard.max_bright
            and soft.min_colour >= hard.min_colour >= 0
            and soft.max_two_levels <= hard.max_two_levels
            and soft.max_damaged <= hard.max_damaged
        ),
        "review.max_unknown must not exceed refusal.max_unknown": (
            policy.review.max_unknown <= policy.refusal.max_unknown
        ),
        "review.same_lesion must not exceed review.same_lesion_if_lower": (
            policy.review.same_lesion <= policy.review.same_lesion_if_lower
        ),
        "rules.unknown.threshold must be a number, at most review.max_unknown": (
            not isinstance(policy.rules.unknown.threshold, str)
            and policy.rules.unknown.threshold <= policy.review.max_unknown
        ),
        "score.severity must fall from mel over scc and bcc to ak, and unk must not exceed mel": (
            severity.mel >= severity.scc >= severity.bcc >= severity.ak and severity.unk <= severity.mel
        ),
        "score.bands.medium must be above 0 and below high": (
            0 < policy.score.bands.medium < policy.score.bands.high
        ),
        "review.max_set_size must be at least 1": policy.review.max_set_size >= 1,
    }
    return [problem for problem, kept in checks.items() if not kept]


POLICIES = Path(__file__).resolve().parent / "policies"
CURRENT_VERSION = "2026-11.4"
#: What some policies are older than, with values that ask nothing; they have answered, and are never edited.
_LATER_LIMITS = {"min_colour": 0.0, "max_two_levels": 1.0, "max_damaged": 1.0}
_LATER = {
    "quality": {"hard": _LATER_LIMITS, "soft": _LATER_LIMITS},
    "review": {"same_lesion": 0.0, "same_lesion_if_lower": 0.0},
}
_OLDER_VERSIONS = frozenset({"2026-11.2", "2026-11.3"})


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
    policy = read_table(RiskPolicy, merge_tables(_LATER, raw) if version in _OLDER_VERSIONS else raw)
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
    shipped = _plain(policy)
    changed = _plain(read_table(RiskPolicy, merge_tables(shipped, overrides)))
    if changed == shipped:
        return policy
    del changed["version"]
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
    version = f"{policy.version.partition('+')[0]}+{digest}"
    return read_table(RiskPolicy, {**changed, "version": version})


def _plain(policy: RiskPolicy) -> dict[str, Any]:
    """As TOML would give it: strings, numbers, lists and tables."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(policy)))
    return plain

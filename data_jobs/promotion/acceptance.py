"""Acceptance: whether a comparison keeps what the recipe demands, criterion by criterion; and the report of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
import json
import math
from pathlib import Path
import tomllib
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.promotion.comparison import Comparison
from data_jobs.training.recipe import AcceptancePlan, read_acceptance
from model_store.registry import StoredModel
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.errors import DermError

#: Beside the manifest, with its digest in it: promotion needs no recipe.
ACCEPTANCE_NAME = "acceptance.json"
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """One criterion: its limit, what was measured, and whether it is kept."""

    criterion: str
    limit: float
    measured: float
    kept: bool


def judge(plan: AcceptancePlan, comparison: Comparison) -> list[Verdict]:
    """Judge every criterion that the plan states; one that could not be measured (NaN) is not kept."""
    verdicts = []
    for criterion, limit in _stated(plan).items():
        measured = _measure(criterion, comparison, plan)
        kept = measured >= limit if criterion.startswith("min_") else measured <= limit
        verdicts.append(Verdict(criterion, limit, measured, kept))
    return verdicts


def _stated(plan: AcceptancePlan) -> dict[str, float]:
    stated = {name: limit for name, limit in asdict(plan).items() if limit is not None}
    del stated["subgroup_images"]
    return stated


def _measure(criterion: str, comparison: Comparison, plan: AcceptancePlan) -> float:
    live, candidate, downgrades = comparison.live, comparison.candidate, comparison.malignant_downgrades
    figure = criterion[len("min_") :]
    if figure == "malignant_downgrade_share":
        return downgrades / max(1, comparison.malignant_images)
    if figure == "malignant_downgrade_excess":
        return (downgrades - comparison.malignant_upgrades) / max(1, comparison.malignant_images)
    if figure == "subgroup_top1_loss":
        judged = [group for group in comparison.subgroups.values() if group.images >= plan.subgroup_images]
        return max((group.live_top1 - group.candidate_top1 for group in judged), default=math.nan)
    if figure.endswith("_loss"):
        figure = figure.removesuffix("_loss")
        return float(getattr(live, figure) - getattr(candidate, figure))
    return float(getattr(candidate, figure))


def write_acceptance(folder: Path, plan: AcceptancePlan) -> None:
    """Write the criteria beside the manifest; the caller seals the folder."""
    content = {**_stated(plan), "subgroup_images": plan.subgroup_images}
    (folder / ACCEPTANCE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse_acceptance(text: str, source: Path) -> AcceptancePlan:
    """Read criteria from JSON, or from the `[acceptance]` of a recipe's TOML.

    Raises DermError for what is neither, an unknown criterion, or none.
    """
    try:
        content = json.loads(text) if source.suffix == ".json" else tomllib.loads(text)["acceptance"]
        return read_acceptance(content)
    except KeyError:
        raise DermError(f"{source} has no [acceptance] table.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DermError(f"{source}: {error}") from error


def read_plan(candidate: StoredModel, given: Path | None) -> AcceptancePlan:
    """Read the criteria that travel with the candidate; those `given` only for one that has none.

    Raises PromotionRefused when there are none, or when its own would be passed over.
    """
    model_id = candidate.manifest.model_id
    own = ACCEPTANCE_NAME in candidate.manifest.files
    if own and given is not None:
        raise PromotionRefused(
            f"{model_id} has its own acceptance criteria, agreed on before it was measured; {given} cannot replace "
            "them."
        )
    if not own and given is None:
        raise PromotionRefused(
            f"{model_id} comes without acceptance criteria: give a recipe that has an [acceptance] table, with "
            "--acceptance."
        )
    path = given or candidate.path(ACCEPTANCE_NAME)
    return parse_acceptance(path.read_text(encoding="utf-8"), path)


def report_json(comparison: Comparison, verdicts: Sequence[Verdict], circumstances: Mapping[str, Any]) -> str:
    """The report as it is kept; `circumstances` say which models, cases, policy, and who asks."""
    content = {
        **circumstances,
        "accepted": all(verdict.kept for verdict in verdicts),
        "acceptance": [asdict(verdict) for verdict in verdicts],
        "figures": {"live": asdict(comparison.live), "candidate": asdict(comparison.candidate)},
        "mcnemar": {name: asdict(pairs) for name, pairs in comparison.paired.items()},
        "malignant_images": comparison.malignant_images,
        "malignant_downgrades": comparison.malignant_downgrades,
        "malignant_upgrades": comparison.malignant_upgrades,
        "subgroups": {name: asdict(group) for name, group in comparison.subgroups.items()},
        "changed": [
            {**asdict(case), "changes": case.changes, "downgraded": case.downgraded}
            for case in comparison.changed
        ],
    }
    return json.dumps(_rounded(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        # p-values of large samples are far below four digits
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


def report_text(comparison: Comparison, verdicts: Sequence[Verdict]) -> str:
    """What changes, the figures, the groups and the verdict, for a terminal of 100 columns."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - for a terminal
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    # Malignant cases that would be seen later come first, then others that would.
    urgent = {
        case.isic_id: 1 + (Diagnosis(case.truth) in MALIGNANT)
        for case in comparison.changed
        if case.downgraded
    }
    return environment.get_template("report.txt.j2").render(
        comparison=comparison,
        kinds=Counter(kind for case in comparison.changed for kind in case.changes),
        changed=sorted(comparison.changed, key=lambda case: -urgent.get(case.isic_id, 0)),
        live=asdict(comparison.live),
        candidate=asdict(comparison.candidate),
        verdicts=verdicts,
    )


def _number(value: float, sign: str = "") -> str:
    if isinstance(value, int):
        return f"{value:{sign}}"
    return "-" if math.isnan(value) else f"{value:{sign}.{_DIGITS}f}"

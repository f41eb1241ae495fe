"""Acceptance: whether a comparison keeps what the recipe demands, criterion by criterion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
import json
import math
from pathlib import Path
import tomllib
from typing import Any

from data_jobs.promotion.candidate import PromotionRefused
from data_jobs.promotion.comparison import Comparison
from data_jobs.training.recipe import AcceptancePlan, read_acceptance
from model_store.registry import StoredModel
from serve_app.domain.errors import DermError

#: Beside the manifest, with its digest in it: promotion needs no recipe.
ACCEPTANCE_NAME = "acceptance.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One criterion: its limit, what was measured, and whether it is kept."""

    criterion: str
    limit: float
    measured: float
    kept: bool


def judge(plan: AcceptancePlan, comparison: Comparison) -> list[Verdict]:
    """Judge every criterion that the plan states.

    What could not be measured (NaN: no subgroup is large enough) is not kept.
    """
    verdicts = []
    for criterion, limit in _stated(plan).items():
        measured = _MEASURES[criterion](comparison, plan)
        kept = measured >= limit if criterion.startswith("min_") else measured <= limit
        verdicts.append(Verdict(criterion, limit, measured, kept))
    return verdicts


def _worst_subgroup(comparison: Comparison, plan: AcceptancePlan) -> float:
    judged = [g.top1_loss for g in comparison.subgroups.values() if g.images >= plan.subgroup_images]
    return max(judged, default=math.nan)


def _loss(figure: str) -> Callable[[Comparison, AcceptancePlan], float]:
    return lambda comparison, _: getattr(comparison.live, figure) - getattr(comparison.candidate, figure)


def _figure(figure: str) -> Callable[[Comparison, AcceptancePlan], float]:
    return lambda comparison, _: float(getattr(comparison.candidate, figure))


_MEASURES: dict[str, Callable[[Comparison, AcceptancePlan], float]] = {
    "min_top1": _figure("top1"),
    "min_top3": _figure("top3"),
    "min_balanced_accuracy": _figure("balanced_accuracy"),
    "min_melanoma_auc": _figure("melanoma_auc"),
    "max_ece": _figure("ece"),
    "min_melanoma_sensitivity_bound": _figure("melanoma_sensitivity_bound"),
    "max_top1_loss": _loss("top1"),
    "max_melanoma_auc_loss": _loss("melanoma_auc"),
    "max_melanoma_sensitivity_loss": _loss("melanoma_sensitivity"),
    "max_melanoma_specificity_loss": _loss("melanoma_specificity"),
    "max_malignant_downgrade_share": lambda c, _: c.malignant_downgrades / max(1, c.malignant_images),
    "max_malignant_downgrade_excess": lambda c, _: (
        (c.malignant_downgrades - c.malignant_upgrades) / max(1, c.malignant_images)
    ),
    "max_subgroup_top1_loss": _worst_subgroup,
}


def _stated(plan: AcceptancePlan) -> dict[str, float]:
    return {name: limit for name, limit in asdict(plan).items() if name in _MEASURES and limit is not None}


def write_acceptance(folder: Path, plan: AcceptancePlan) -> None:
    """Write the criteria beside the manifest; the caller seals the folder."""
    content = {**_stated(plan), "subgroup_images": plan.subgroup_images}
    (folder / ACCEPTANCE_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def parse_acceptance(text: str, source: Path) -> AcceptancePlan:
    """Read criteria from JSON, or from the `[acceptance]` of a recipe's TOML.

    Raises DermError for what is neither, an unknown criterion, or none.
    """
    try:
        content: dict[str, Any] = (
            json.loads(text) if source.suffix == ".json" else tomllib.loads(text)["acceptance"]
        )
        return read_acceptance(content)
    except KeyError:
        raise DermError(f"{source} has no [acceptance] table.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DermError(f"{source}: {error}") from error


def read_plan(candidate: StoredModel, given: Path | None) -> AcceptancePlan:
    """Read the criteria that travel with the candidate; those `given` only for one that has none.

    Raises PromotionRefused when there are none, with which anything would pass, or when its own
    would be passed over.
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

"""A recipe: every number that shapes a model's weights, read from one TOML file."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
import hashlib
import json
import math
from pathlib import Path
import re
import tomllib
from typing import Any, TypeVar

from data_jobs.training.plans import (
    AcceptancePlan,
    AugmentPlan,
    DataPlan,
    DistillationPlan,
    LossPlan,
    NetworkPlan,
    OptimiserPlan,
    Stage,
    StartPlan,
    TeacherPlan,
    WeightsPlan,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Younger than the first recipes: where they are None the digest leaves them out, so that it stays what it was.
_ADDED = frozenset({"distillation", "with_bcn84", "left_out", "reserve_share", "reserve_seed"}) | frozenset(
    {"draws", "bcn84", "soft", "clutter", "repeats"}
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model: its data, network, optimisation, augmentation and stages of input size."""

    architecture: str
    tag: str
    seed: int
    data: DataPlan
    network: NetworkPlan
    optimiser: OptimiserPlan
    loss: LossPlan
    augment: AugmentPlan
    stages: tuple[Stage, ...]
    serving_sides: tuple[int, ...]
    start: StartPlan | None = None
    weights: WeightsPlan | None = None
    distillation: DistillationPlan | None = None
    acceptance: AcceptancePlan | None = None

    @property
    def model_id(self) -> str:
        """`architecture.tag`, the name of the model everywhere else."""
        return f"{self.architecture}.{self.tag}"

    @property
    def training_digest(self) -> str:
        """SHA-256 (hex) of all that shapes the weights: two recipes of one digest train the same run.

        What is asked of the model afterwards (serving sides, acceptance) is no part of it.
        """
        plans = _without_added(asdict(self))
        del plans["serving_sides"], plans["acceptance"]
        return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()

    @property
    def epoch_stages(self) -> tuple[Stage, ...]:
        """The stage of every epoch, in order."""
        return tuple(stage for stage in self.stages for _ in range(stage.epochs))

    @property
    def epoch_sides(self) -> tuple[int, ...]:
        """The input side of every epoch, in order."""
        return tuple(stage.side for stage in self.epoch_stages)

    def member(self, fold: int) -> Recipe:
        """The same recipe for the member of an ensemble that leaves out `fold`; its own seed and tag.

        Raises ValueError when that is no training fold.
        """
        if fold not in self.data.train_folds:
            raise ValueError(f"Fold {fold} is none of the training folds {self.data.train_folds}.")
        data = replace(self.data, left_out=fold)
        return replace(self, tag=f"{self.tag}m{fold}", seed=self.seed + fold, data=data)


def _without_added(value: Any) -> Any:  # noqa: ANN401 - what asdict gives
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if part is not None or name not in _ADDED}
        return {name: _without_added(part) for name, part in kept.items()}
    return [_without_added(part) for part in value] if isinstance(value, list | tuple) else value


_Plan = TypeVar(
    "_Plan",
    DataPlan,
    StartPlan,
    WeightsPlan,
    TeacherPlan,
    DistillationPlan,
    NetworkPlan,
    OptimiserPlan,
    LossPlan,
    AugmentPlan,
    Stage,
    AcceptancePlan,
)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises ValueError for a missing or unknown key, folds that overlap, or a start that is none."""
    with path.open("rb") as file:
        raw = tomllib.load(file)
    try:
        recipe = Recipe(
            architecture=raw.pop("architecture"),
            tag=raw.pop("tag"),
            seed=raw.pop("seed"),
            data=_read(DataPlan, raw.pop("data")),
            network=_read(NetworkPlan, raw.pop("network")),
            optimiser=_read(OptimiserPlan, raw.pop("optimiser")),
            loss=_read(LossPlan, raw.pop("loss")),
            augment=_read(AugmentPlan, raw.pop("augment")),
            stages=tuple(_read(Stage, stage) for stage in raw.pop("stages")),
            serving_sides=tuple(raw.pop("serving")["sides"]),
            start=_read(StartPlan, raw.pop("start")) if "start" in raw else None,
            weights=_read(WeightsPlan, raw.pop("weights")) if "weights" in raw else None,
            distillation=_read_distillation(raw.pop("distillation")) if "distillation" in raw else None,
            acceptance=read_acceptance(raw.pop("acceptance")) if "acceptance" in raw else None,
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from error
    if raw:
        raise ValueError(f"{path}: unknown {', '.join(sorted(raw))}.")
    _check_start(recipe, path)
    _check_distillation(recipe, path)
    plan = recipe.data
    if {plan.test_fold, plan.calibration_fold} & set(plan.train_folds):
        raise ValueError(f"{path}: the training folds must not overlap the test or calibration fold.")
    return recipe


def _check_start(recipe: Recipe, path: Path) -> None:
    if recipe.weights is None:
        return
    if recipe.start is not None:
        raise ValueError(f"{path}: a run starts from [start] or from [weights], not from both.")
    if not recipe.weights.file.endswith(".safetensors"):
        raise ValueError(f"{path}: weights are read from safetensors files, not from {recipe.weights.file}.")
    if not _SHA256.fullmatch(recipe.weights.sha256):
        raise ValueError(f"{path}: weights.sha256 must be 64 lower-case hexadecimal digits.")


def _read_distillation(raw: dict[str, Any]) -> DistillationPlan:
    teachers = tuple(_read(TeacherPlan, teacher) for teacher in raw.pop("teachers"))
    return _read(DistillationPlan, raw | {"teachers": teachers})


def _check_distillation(recipe: Recipe, path: Path) -> None:
    plan = recipe.distillation
    if plan is None:
        return
    if not math.isclose(sum(teacher.share for teacher in plan.teachers), 1.0):
        raise ValueError(f"{path}: the shares of the teachers must make up 1.")
    if not 0.0 < plan.loss_share <= 1.0:
        raise ValueError(f"{path}: distillation.loss_share must be over 0 and at most 1.")
    if max(recipe.epoch_sides) > plan.side:
        raise ValueError(f"{path}: the student cannot see more than its teachers do ({plan.side} pixels).")
    if any(not _SHA256.fullmatch(teacher.model_sha256) for teacher in plan.teachers):
        raise ValueError(f"{path}: model_sha256 must be 64 lower-case hexadecimal digits.")


def read_acceptance(raw: dict[str, Any]) -> AcceptancePlan:
    """Read criteria. Raises ValueError for an unknown one, one that is no number, or none at all."""
    plan = _read(AcceptancePlan, raw)
    wrong = [
        name
        for name, value in raw.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ]
    if wrong:
        raise ValueError(f"acceptance: {', '.join(wrong)} must be a number.")
    if not set(raw) - {"subgroup_images"}:
        raise ValueError("acceptance: there is no criterion, so that any model would pass.")
    return plan


def _read(kind: type[_Plan], raw: dict[str, Any]) -> _Plan:
    names = {field.name for field in fields(kind)}
    if unknown := set(raw) - names:
        raise ValueError(f"{kind.__name__}: unknown {', '.join(sorted(unknown))}.")
    if missing := {field.name for field in fields(kind) if field.default is MISSING} - set(raw):
        raise KeyError(f"{kind.__name__}.{min(missing)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return kind(**values)

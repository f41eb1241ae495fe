"""A segmenter's recipe: every number that shapes its weights, in one TOML file, in the classifier's own terms."""

from __future__ import annotations

from dataclasses import asdict, dataclass
import hashlib
import json
from pathlib import Path
import tomllib

from data_jobs.training.recipe import AugmentPlan, DataPlan, OptimiserPlan, Stage, StartPlan, read_table


@dataclass(frozen=True, slots=True)
class OutlinePlan:
    """The network: mean and std on the 0-1 scale, channels of the decoder's maps and of its finest.

    `trunk_groups` of the trunk's block groups are used; `frozen_groups` after the stem keep the weights and statistics
    that they come with.
    """

    mean: float
    std: float
    channels: int
    fine_channels: int
    trunk_groups: int
    frozen_groups: int


@dataclass(frozen=True, slots=True)
class SegmenterRecipe:
    """One segmenter: its data, start, network, optimisation, augmentation and stages of input size.

    `trunk` is timm's name of what `[start]` holds the weights of; `side` the input side as served.
    """

    architecture: str
    tag: str
    seed: int
    trunk: str
    side: int
    data: DataPlan
    start: StartPlan
    network: OutlinePlan
    optimiser: OptimiserPlan
    augment: AugmentPlan
    stages: tuple[Stage, ...]

    @property
    def model_id(self) -> str:
        """`architecture.tag`."""
        return f"{self.architecture}.{self.tag}"

    @property
    def training_digest(self) -> str:
        """SHA-256 (hex) of all that shapes the weights; at which side they are served is no part of it."""
        plans = asdict(self)
        del plans["side"]
        return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()

    @property
    def epoch_stages(self) -> tuple[Stage, ...]:
        """The stage of every epoch, in order."""
        return tuple(stage for stage in self.stages for _ in range(stage.epochs))


_TABLES = {
    "data": DataPlan,
    "start": StartPlan,
    "network": OutlinePlan,
    "optimiser": OptimiserPlan,
    "augment": AugmentPlan,
}


def read_segmenter_recipe(path: Path) -> SegmenterRecipe:
    """Read a recipe. Raises ValueError for a missing or unknown key, or folds that overlap."""
    with path.open("rb") as file:
        raw = tomllib.load(file)
    try:
        raw |= {name: read_table(kind, raw[name]) for name, kind in _TABLES.items()}
        raw["stages"] = [read_table(Stage, stage) for stage in raw["stages"]]
        recipe = read_table(SegmenterRecipe, raw)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from error
    held_out = {recipe.data.test_fold, recipe.data.calibration_fold}
    if held_out & {*recipe.data.train_folds, *recipe.start.seen_folds} or len(held_out) < 2:
        raise ValueError(f"{path}: test, calibration and training folds, and those seen before, must differ.")
    return recipe

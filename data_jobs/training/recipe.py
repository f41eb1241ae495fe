"""A recipe: every number that shapes a model's weights, read from one TOML file."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
import hashlib
import json
import math
from pathlib import Path
import re
import tomllib
from typing import Any, Literal, TypeVar

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Which folds do what; no lesion of the test or calibration fold is trained on.

    `test_fold` is read by `evaluate` alone, unless it is the calibration fold as well: then
    every figure on it is cross-fitted (`data_jobs.training.cross_fitting`).
    """

    test_fold: int
    calibration_fold: int
    train_folds: tuple[int, ...]
    cache_side: int
    interpolation: Literal["bilinear", "bicubic"]


@dataclass(frozen=True, slots=True)
class StartPlan:
    """Where training starts from instead of ImageNet: an earlier model's checkpoint, by its SHA-256."""

    model_id: str
    checkpoint_sha256: str


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """timm's own weights for the trunk, to start from: the name of a safetensors file, and its SHA-256 (hex).

    The head in it is left out: the network has another.
    """

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """Input mean and std on the 0-1 scale (one number, or one a channel), dropout, stochastic depth.

    `frozen_groups` block groups after the stem keep their ImageNet weights and statistics.
    """

    mean: float | tuple[float, float, float]
    std: float | tuple[float, float, float]
    dropout: float
    drop_path: float
    frozen_groups: int

    @property
    def channel_mean(self) -> tuple[float, float, float]:
        """Mean of red, green and blue."""
        return self.mean if isinstance(self.mean, tuple) else (self.mean,) * 3

    @property
    def channel_std(self) -> tuple[float, float, float]:
        """Standard deviation of red, green and blue."""
        return self.std if isinstance(self.std, tuple) else (self.std,) * 3


@dataclass(frozen=True, slots=True)
class OptimiserPlan:
    """AdamW under a cosine with linear warm-up; learning rates are the peaks."""

    batch_size: int
    trunk_lr: float
    head_lr: float
    weight_decay: float
    warmup: float
    ema_decay: float
    clip_norm: float


@dataclass(frozen=True, slots=True)
class LossPlan:
    """Logit-adjusted cross-entropy (Menon et al., ICLR 2021) over a class-tempered sample.

    `mixup` is the alpha of the Beta distribution that images and labels of a batch are mixed by
    (Zhang et al., ICLR 2018); 0 mixes nothing.
    """

    label_smoothing: float
    sampling_power: float
    logit_adjustment: float
    mixup: float = 0.0


@dataclass(frozen=True, slots=True)
class AugmentPlan:
    """Strength of each augmentation; a pair is the range of a uniform draw."""

    crop_area: tuple[float, float]
    aspect_jitter: float
    small_rotation: float
    capture_scale: tuple[float, float]
    jpeg_share: float
    jpeg_quality: tuple[int, int]
    blur_share: float
    blur_sigma: tuple[float, float]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    channel_gain: float


@dataclass(frozen=True, slots=True)
class Stage:
    """`epochs` passes at `side` pixels."""

    side: int
    epochs: int


@dataclass(frozen=True, slots=True)
class AcceptancePlan:
    """What a candidate must keep, on the test fold, to take the place of the live model.

    None: not asked. `min_` and `max_` bound the candidate alone; a `_loss` is live minus
    candidate, so 0 means "no worse". Melanoma sensitivity and specificity are those of the
    operating point `melanoma`, by lesion; `_bound` is the one-sided 95 % Clopper-Pearson bound.
    A downgrade is a malignant image whose referral becomes less urgent than under the live
    model. Subgroups of fewer than `subgroup_images` images are not judged.
    """

    min_top1: float | None = None
    min_top3: float | None = None
    min_balanced_accuracy: float | None = None
    min_melanoma_auc: float | None = None
    max_ece: float | None = None
    min_melanoma_sensitivity_bound: float | None = None
    max_top1_loss: float | None = None
    max_melanoma_auc_loss: float | None = None
    max_melanoma_sensitivity_loss: float | None = None
    max_melanoma_specificity_loss: float | None = None
    max_malignant_downgrade_share: float | None = None
    max_subgroup_top1_loss: float | None = None
    subgroup_images: int = 50


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
        plans = asdict(self)
        del plans["serving_sides"], plans["acceptance"]
        return hashlib.sha256(json.dumps(plans, sort_keys=True).encode()).hexdigest()

    @property
    def epoch_sides(self) -> tuple[int, ...]:
        """The input side of every epoch, in order."""
        return tuple(stage.side for stage in self.stages for _ in range(stage.epochs))


_Plan = TypeVar(
    "_Plan",
    DataPlan,
    StartPlan,
    WeightsPlan,
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
            acceptance=read_acceptance(raw.pop("acceptance")) if "acceptance" in raw else None,
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from error
    if raw:
        raise ValueError(f"{path}: unknown {', '.join(sorted(raw))}.")
    _check_start(recipe, path)
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

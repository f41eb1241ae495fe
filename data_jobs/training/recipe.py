"""A recipe: every number that shapes a model's weights, read from one TOML file, and what each number means."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
import hashlib
import json
import math
from pathlib import Path
import re
import tomllib
from typing import Any, Literal, TypeVar

#: Where a labelled image comes from: train.csv, or bcn84.csv, another hospital's images of 84 by 84 pixels.
SOURCES = ("archive", "bcn84")
BCN84_SIDE = 84


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Which folds do what; no lesion of the test or calibration fold is trained on.

    `test_fold` is read by `evaluate` alone. `with_bcn84` adds the other hospital's images, in the same folds. Of the
    training folds a member of an ensemble does without `left_out`, and every member without the reserve
    (`dataset.reserve`).
    """

    test_fold: int
    calibration_fold: int
    train_folds: tuple[int, ...]
    cache_side: int
    interpolation: Literal["bilinear", "bicubic"]
    with_bcn84: bool | None = None
    left_out: int | None = None
    reserve_share: float | None = None
    reserve_seed: int | None = None

    @property
    def fitted_fold(self) -> int:
        """The fold that export and calibration fit to: what a member left out, else the calibration fold.

        Raises ValueError where that is the test fold: its figures would be of what they were fitted to.
        """
        fold = self.calibration_fold if self.left_out is None else self.left_out
        if fold == self.test_fold:
            raise ValueError(
                f"Fold {fold} is the test fold: a recipe of one network needs another calibration_fold, a member left_out."
            )
        return fold


@dataclass(frozen=True, slots=True)
class StartPlan:
    """Where training starts from instead of ImageNet: an earlier model's checkpoint, by its SHA-256.

    `seen_folds` are those that model was trained on, whole: what of them this run leaves out is not unseen.
    """

    model_id: str
    checkpoint_sha256: str
    seen_folds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WeightsPlan:
    """timm's own weights for the trunk, to start from: the name of a safetensors file, and its SHA-256 (hex).

    The head in it is left out: the network has another.
    """

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """A model that teaches: the SHA-256 (hex) of its `model.onnx`, its weight among the teachers.

    `prior_shift` is what its export restored of the prior (`export.json`); it is taken out again.
    """

    model_id: str
    model_sha256: str
    share: float
    prior_shift: float


@dataclass(frozen=True, slots=True)
class DistillationPlan:
    """Who teaches, at which input side, and which share of the loss is theirs; the rest is the labels'."""

    side: int
    loss_share: float
    teachers: tuple[TeacherPlan, ...]


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
    """`epochs` passes at `side` pixels, each of `draws` images (None: as many as there are).

    `bcn84` is the share of the other hospital's images in every class, `soft` the share of the full-size images
    that are reduced to its size first, `clutter` the share of all that get clutter (`data_jobs.training.clutter`).
    `repeats` is how often an image may be drawn in an epoch; a class of which too few are left is drawn less.
    """

    side: int
    epochs: int
    draws: int | None = None
    bcn84: float | None = None
    soft: float | None = None
    clutter: float | None = None
    repeats: int | None = None


@dataclass(frozen=True, slots=True)
class AcceptancePlan:
    """What a candidate must keep, on the test fold, to take the place of the live model.

    None: not asked. `min_` and `max_` bound the candidate alone; a `_loss` is live minus
    candidate, so 0 means "no worse". Melanoma sensitivity and specificity are those of the
    operating point `melanoma`, by lesion; `_bound` is the one-sided 95 % Clopper-Pearson bound.
    A downgrade is a malignant image whose referral becomes less urgent than under the live
    model; `_share` counts them all, `_excess` after those that become more urgent are taken off:
    two networks that are equal in all else still change places on every twentieth image.
    Subgroups of fewer than `subgroup_images` images are not judged.
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
    max_malignant_downgrade_excess: float | None = None
    max_subgroup_top1_loss: float | None = None
    subgroup_images: int = 50


_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Younger than the first recipes: where they are None the digest leaves them out, so that it stays what it was.
_ADDED = frozenset({"distillation", "with_bcn84", "left_out", "reserve_share", "reserve_seed"}) | frozenset(
    {"draws", "bcn84", "soft", "clutter", "repeats"}
)
#: Says nothing of how weights come about.
_TOLD = frozenset({"seen_folds"})


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
        kept = {
            name: part
            for name, part in value.items()
            if name not in _TOLD and (part is not None or name not in _ADDED)
        }
        return {name: _without_added(part) for name, part in kept.items()}
    return [_without_added(part) for part in value] if isinstance(value, list | tuple) else value


_Plan = TypeVar("_Plan")
_TABLES = {
    "data": DataPlan,
    "network": NetworkPlan,
    "optimiser": OptimiserPlan,
    "loss": LossPlan,
    "augment": AugmentPlan,
    "start": StartPlan,
    "weights": WeightsPlan,
}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises ValueError for a missing or unknown key, folds that overlap, or a start that is none."""
    with path.open("rb") as file:
        raw = tomllib.load(file)
    try:
        raw |= {name: read_table(kind, raw[name]) for name, kind in _TABLES.items() if name in raw}
        raw["stages"] = [read_table(Stage, stage) for stage in raw["stages"]]
        raw["serving_sides"] = raw.pop("serving")["sides"]
        if "distillation" in raw:
            teachers = [read_table(TeacherPlan, teacher) for teacher in raw["distillation"].pop("teachers")]
            raw["distillation"] = read_table(DistillationPlan, raw["distillation"] | {"teachers": teachers})
        if "acceptance" in raw:
            raw["acceptance"] = read_acceptance(raw["acceptance"])
        recipe = read_table(Recipe, raw)
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing.") from error
    _check(recipe, path)
    return recipe


def _check(recipe: Recipe, path: Path) -> None:
    weights, taught, plan = recipe.weights, recipe.distillation, recipe.data
    kept: dict[str, bool] = {}
    if weights is not None:
        kept |= {
            "a run starts from [start] or from [weights], not from both.": recipe.start is None,
            f"weights are read from safetensors files, not from {weights.file}.": (
                weights.file.endswith(".safetensors")
            ),
            "weights.sha256 must be 64 lower-case hexadecimal digits.": bool(
                _SHA256.fullmatch(weights.sha256)
            ),
        }
    if taught is not None:
        kept |= {
            "the shares of the teachers must make up 1.": math.isclose(
                sum(t.share for t in taught.teachers), 1.0
            ),
            "distillation.loss_share must be over 0 and at most 1.": 0.0 < taught.loss_share <= 1.0,
            f"the student cannot see more than its teachers do ({taught.side} pixels).": (
                max(stage.side for stage in recipe.stages) <= taught.side
            ),
            "model_sha256 must be 64 lower-case hexadecimal digits.": (
                all(_SHA256.fullmatch(teacher.model_sha256) for teacher in taught.teachers)
            ),
        }
    kept["the training folds must not overlap the test or calibration fold."] = not (
        {plan.test_fold, plan.calibration_fold} & set(plan.train_folds)
    )
    if problem := next((problem for problem, holds in kept.items() if not holds), None):
        raise ValueError(f"{path}: {problem}")


def read_acceptance(raw: dict[str, Any]) -> AcceptancePlan:
    """Read criteria. Raises ValueError for an unknown one, one that is no number, or none at all."""
    plan = read_table(AcceptancePlan, raw)
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


def read_table(kind: type[_Plan], raw: dict[str, Any]) -> _Plan:
    """A plan from its table. Raises ValueError for an unknown key, KeyError for a missing one."""
    wanted = {field.name: field.default is MISSING for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := set(raw) - set(wanted):
        raise ValueError(f"{kind.__name__}: unknown {', '.join(sorted(unknown))}.")
    if missing := {name for name, needed in wanted.items() if needed} - set(raw):
        raise KeyError(f"{kind.__name__}.{min(missing)}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return kind(**values)

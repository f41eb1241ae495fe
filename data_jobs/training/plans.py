"""The parts of a recipe, as its tables give them: what each number means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Which folds do what; no lesion of the test or calibration fold is trained on.

    `test_fold` is read by `evaluate` alone, unless it is the calibration fold as well: then
    every figure on it is cross-fitted (`data_jobs.training.cross_fitting`). `with_bcn84` adds the other
    hospital's images, in the same folds. Of the training folds a member of an ensemble does without
    `left_out`, and every member without the reserve (`dataset.reserve`).
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

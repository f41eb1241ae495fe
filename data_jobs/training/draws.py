"""What an epoch trains on: which images, how often, in which augmented views."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_jobs.training.augment import augment
from data_jobs.training.recipe import BCN84_SIDE, SOURCES, Recipe, Stage
from serve_app.domain.diagnosis import TRAINED

#: Of every image uint8 side×side×3, its own side.
Pixels = Sequence[NDArray[np.uint8]]
Labels = NDArray[np.int64]


class AugmentedDraws(Dataset[tuple[Tensor, int]]):
    """One epoch's draws: position -> an augmented view, seeded by (seed, epoch, position)."""

    def __init__(
        self, pixels: Pixels, labels: Labels, draws: Labels, side: int, recipe: Recipe, epoch: int
    ) -> None:
        self.pixels, self.labels, self.draws = pixels, labels, draws
        self.side, self.recipe, self.epoch = side, recipe, epoch

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.recipe.seed, self.epoch, position))
        index = self.draws[position]
        pixels, stage = self.pixels[index], self.recipe.epoch_stages[self.epoch]
        soft = len(pixels) > BCN84_SIDE and _chosen(stage.soft, rng)
        cluttered = _chosen(stage.clutter, rng)
        view = augment(pixels, self.side, self.recipe.augment, rng, soft=soft, cluttered=cluttered)
        return torch.from_numpy(view), int(self.labels[index])


def _chosen(share: float | None, rng: np.random.Generator) -> bool:
    # Nothing is drawn for a stage without it, so that older recipes give the views that they gave.
    return bool(share) and rng.random() < (share or 0.0)


def class_counts(labels: Labels, sources: Labels, power: float, stage: Stage, draws: int) -> Labels:
    """How often to draw of every class and source, C×S, for images of these labels and sources.

    A class of n images gets a share of the draws in proportion to n**power, and every source the same share of every
    class: neither the hospital nor its softness can tell the class (a source-balanced sampler). A class whose images
    would be drawn more than `stage.repeats` times is drawn less, of all sources alike.
    """
    members = np.zeros((len(TRAINED), len(SOURCES)))
    np.add.at(members, (labels, sources), 1)
    other = sources.mean() if stage.bcn84 is None else stage.bcn84
    shares = np.array([1.0 - other, other]) * (members > 0)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1e-9)
    counts = sampled_prior(labels, power)[:, None] * shares * draws
    if stage.repeats:
        most = stage.repeats * members / np.maximum(counts, 1e-9)
        counts *= np.where(counts > 0, most, 1.0).clip(max=1.0).min(1, keepdims=True)
    return counts.round().astype(np.int64)


def draw_epoch(
    labels: Labels, sources: Labels, indices: Labels, counts: Labels, rng: np.random.Generator
) -> Labels:
    """As many draws of `indices` as `counts` (C×S) says of every class and source.

    Within them every image comes up equally often, give or take one: no image of a common
    class is drawn twice before each is drawn once.
    """
    draws = [np.empty(0, np.int64)]
    for (label, source), count in np.ndenumerate(counts):
        members = indices[(labels[indices] == label) & (sources[indices] == source)]
        rounds = [rng.permutation(members) for _ in range(math.ceil(count / max(1, len(members))))]
        draws.append(np.concatenate([draws[0], *rounds])[:count])
    return rng.permutation(np.concatenate(draws))


def sampled_prior(labels: Labels, power: float) -> NDArray[np.float64]:
    """Class shares after sampling in proportion to n**power."""
    counts = np.bincount(labels, minlength=len(TRAINED)).astype(np.float64) ** power
    return counts / counts.sum()

"""What an epoch trains on: which images, how often, in which augmented views."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_jobs.training.augment import augment
from data_jobs.training.recipe import Recipe
from serve_app.domain.diagnosis import TRAINED

Pixels = NDArray[np.uint8]
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
        view = augment(self.pixels[index], self.side, self.recipe.augment, rng)
        return torch.from_numpy(view), int(self.labels[index])


def draw_epoch(labels: Labels, indices: Labels, power: float, rng: np.random.Generator) -> Labels:
    """As many draws as there are indices; a class of n images gets a share in proportion to n**power.

    Within a class every image comes up equally often, give or take one: no image of a common
    class is drawn twice before each is drawn once.
    """
    shares = sampled_prior(labels[indices], power)
    draws = []
    for label, share in enumerate(shares):
        members = indices[labels[indices] == label]
        count = round(share * len(indices))
        repeats = math.ceil(count / max(1, len(members)))
        rounds = [rng.permutation(members) for _ in range(repeats)]
        draws.append(np.concatenate([np.empty(0, np.int64), *rounds])[:count])
    return rng.permutation(np.concatenate(draws))


def sampled_prior(labels: Labels, power: float) -> NDArray[np.float64]:
    """Class shares after sampling in proportion to n**power."""
    counts = np.bincount(labels, minlength=len(TRAINED)).astype(np.float64) ** power
    return counts / counts.sum()

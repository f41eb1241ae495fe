"""The loss of a batch: mixed images, logits adjusted to the prior as it was sampled, and what teachers say of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_jobs.training.recipe import LossPlan


@dataclass(frozen=True, slots=True)
class Mixture:
    """A batch of images N×3×H×W, each `share` of itself and 1 - `share` of its partner; both labels.

    `taught`: what the teachers say of these images, logits N×8; None without teachers.
    """

    images: Tensor
    labels: Tensor
    partners: Tensor
    share: float
    taught: Tensor | None = None


def mix(images: Tensor, labels: Tensor, alpha: float, rng: np.random.Generator) -> Mixture:
    """Mixup (Zhang et al., ICLR 2018): one share a batch from Beta(alpha, alpha), the larger part kept."""
    if alpha == 0.0:
        return Mixture(images, labels, labels, 1.0)
    share = float(rng.beta(alpha, alpha))
    share = max(share, 1.0 - share)
    order = torch.from_numpy(rng.permutation(len(labels))).to(images.device, non_blocking=True)
    return Mixture(torch.lerp(images[order], images, share), labels, labels[order], share)


class AdjustedLoss(nn.Module):
    """Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10).

    Where there are teachers, `taught_share` of it is against their probabilities under the same prior
    (Hinton et al., 2015, at temperature 1), the rest against the labels.
    """

    def __init__(self, prior: NDArray[np.float64], plan: LossPlan, taught_share: float = 0.0) -> None:
        super().__init__()
        self.taught_share = taught_share
        adjustment = plan.logit_adjustment * np.log(prior)
        self.register_buffer("adjustment", torch.from_numpy(adjustment).float())
        self.loss = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)

    def forward(self, logits: Tensor, mixture: Mixture) -> Tensor:
        """Mean loss of a batch."""
        adjusted = logits + self.adjustment
        loss: Tensor = self.loss(adjusted, mixture.labels)
        if mixture.share < 1.0:
            loss = mixture.share * loss + (1.0 - mixture.share) * self.loss(adjusted, mixture.partners)
        if mixture.taught is not None:
            answers = (mixture.taught + self.adjustment).softmax(1)
            loss = torch.lerp(loss, functional.cross_entropy(adjusted, answers), self.taught_share)
        return loss

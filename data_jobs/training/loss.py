"""The loss of a batch: mixed images, and logits adjusted to the prior as it was sampled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor, nn

from data_jobs.training.recipe import LossPlan


@dataclass(frozen=True, slots=True)
class Mixture:
    """A batch of images N×3×H×W, each `share` of itself and 1 - `share` of its partner; both labels."""

    images: Tensor
    labels: Tensor
    partners: Tensor
    share: float


def mix(images: Tensor, labels: Tensor, alpha: float, rng: np.random.Generator) -> Mixture:
    """Mixup (Zhang et al., ICLR 2018): one share a batch from Beta(alpha, alpha), the larger part kept."""
    if alpha == 0.0:
        return Mixture(images, labels, labels, 1.0)
    share = float(rng.beta(alpha, alpha))
    share = max(share, 1.0 - share)
    order = torch.from_numpy(rng.permutation(len(labels))).to(images.device)
    return Mixture(torch.lerp(images[order], images, share), labels, labels[order], share)


class AdjustedLoss(nn.Module):
    """Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10)."""

    def __init__(self, prior: NDArray[np.float64], plan: LossPlan) -> None:
        super().__init__()
        adjustment = plan.logit_adjustment * np.log(prior)
        self.register_buffer("adjustment", torch.from_numpy(adjustment).float())
        self.loss = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)

    def forward(self, logits: Tensor, mixture: Mixture) -> Tensor:
        """Mean loss of a batch."""
        adjusted = logits + self.adjustment
        loss: Tensor = self.loss(adjusted, mixture.labels)
        if mixture.share < 1.0:
            loss = mixture.share * loss + (1.0 - mixture.share) * self.loss(adjusted, mixture.partners)
        return loss

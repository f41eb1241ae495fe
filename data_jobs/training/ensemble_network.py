"""The networks of an ensemble as one, with the head that scores what none of them knows: what `export` writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from sklearn.decomposition import PCA
import torch
from torch import Tensor, nn

from data_jobs.training.ensemble import Ensemble
from data_jobs.training.network import DermNetwork, load_weights
from data_jobs.training.unknown import CLIP, LEAST_DISTANCE, STRAY, UnknownHead
from model_store.manifest import EMBEDDING_DIM


class UnknownScore(nn.Module):
    """`UnknownHead.score` in the graph: measures N×F to scores N, float32."""

    def __init__(self, head: UnknownHead) -> None:
        super().__init__()
        self.mean, self.scale, self.weight, self.axes = (
            nn.Buffer(torch.from_numpy(part)) for part in (head.mean, head.scale, head.weight, head.axes)
        )
        self.bias, self.rest, self.reach = head.bias, head.rest, head.reach

    def forward(self, measures: Tensor) -> Tensor:
        """One score an image."""
        z = ((measures - self.mean) / self.scale).clamp(-CLIP, CLIP)
        distance = self.rest * z.square().sum(1) - (z @ self.axes).square().sum(1)
        return (
            z @ self.weight
            + self.bias
            + STRAY * (distance.clamp(min=LEAST_DISTANCE).log() - self.reach).clamp(min=0.0)
        )


class EnsembleNetwork(nn.Module):
    """Pixels 0-255, float N×3×H×W, to the mean of the members' logits N×8, a bottleneck N×512, UNK scores N.

    Of several members also their own logits N×M×8.
    """

    def __init__(self, members: list[DermNetwork], heads: list[UnknownHead]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.heads = nn.ModuleList(UnknownScore(head) for head in heads)
        width = EMBEDDING_DIM * len(members)
        # Of one member the identity, which the graph leaves out.
        self.centre = nn.Buffer(torch.zeros(width))
        self.axes = nn.Buffer(torch.eye(EMBEDDING_DIM, width))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what `forward` gives, in order."""
        return ("logits", "bottleneck", "unknown", *(("member_logits",) if len(self.members) > 1 else ()))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """One pass: see `outputs`; the UNK scores are the mean of the heads'."""
        answers = [member.measure(pixels) for member in self.members]
        logits = torch.stack([answer[0] for answer in answers], dim=1)
        features = torch.cat([answer[1] for answer in answers], dim=1)
        scores = [head(answer[2]) for head, answer in zip(self.heads, answers, strict=True)]
        unknown = torch.stack(scores, dim=1).mean(1)
        if len(answers) == 1:
            return logits.squeeze(1), features, unknown
        return logits.mean(1), (features - self.centre) @ self.axes.T, unknown, logits

    @torch.no_grad()
    def fit_bottleneck(self, features: NDArray[np.float32]) -> float:
        """Choose the 512 directions that vary most over the members' bottlenecks side by side, N×(M·512).

        Returns the share of the variance that they hold. Nothing to do for one member.
        """
        if len(self.members) == 1:
            return 1.0
        found = PCA(EMBEDDING_DIM, svd_solver="covariance_eigh").fit(features.astype(np.float64))
        self.centre.copy_(torch.from_numpy(found.mean_))
        self.axes.copy_(torch.from_numpy(found.components_))
        return float(found.explained_variance_ratio_.sum())


def load_members(ensemble: Ensemble, weights: list[Path]) -> list[DermNetwork]:
    """The members' networks with their weights, in evaluation mode; ValueError for weights that are not the named ones."""
    networks = []
    for recipe, path, digest in zip(ensemble.members, weights, ensemble.weights_sha256, strict=True):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{path} are not the weights of {recipe.model_id}: their SHA-256 is another.")
        network = DermNetwork(recipe.architecture, recipe.network).eval()
        load_weights(
            network, recipe.architecture, {k: v.float() for k, v in load_safetensors(content).items()}
        )
        networks.append(network)
    return networks

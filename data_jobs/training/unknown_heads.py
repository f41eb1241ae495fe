"""The members' heads for p(UNK): what they are fitted on, and the line from their mean score to p(UNK).

A member's head is fitted on the fold that the member left out, of both hospitals, against the outliers' `fit` part:
each image as it is prepared and as `captured`. The line is fitted to the mean of the heads, on images that neither a
member nor a head has seen, and on outliers scored by heads fitted without their own source.
"""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import torch

from data_jobs.training.dataset import LabelledImage, load_pixels
from data_jobs.training.ensemble import Ensemble
from data_jobs.training.network import DermNetwork
from data_jobs.training.outliers import captured, make_outliers, skin_like
from data_jobs.training.scan import Pixels
from data_jobs.training.unknown import (
    HEAD_PRIOR,
    SPOILT,
    Examples,
    UnknownHead,
    cross_fitted,
    fit_head,
    fit_logistic,
)
from deployments.preprocess.pixels import InputGeometry

#: Every so many images of a fold left out: 1,700 of both hospitals are plenty for 1,120 weights under a ridge.
STRIDE = 3


@dataclass(frozen=True, slots=True)
class FittedHeads:
    """One head a member, and p(UNK) = sigmoid(slope * mean of their scores + intercept)."""

    heads: list[UnknownHead]
    slope: float
    intercept: float


@torch.inference_mode()
def measure(network: DermNetwork, pixels: Pixels, batch: int = 64) -> NDArray[np.float32]:
    """`DermNetwork.measure`'s third output, N×F, of uint8 N×S×S×3."""
    parts = (torch.from_numpy(pixels[i : i + batch]) for i in range(0, len(pixels), batch))
    return np.concatenate([network.measure(part.float().permute(0, 3, 1, 2))[2].numpy() for part in parts])


def fit_heads(
    ensemble: Ensemble,
    networks: list[DermNetwork],
    rows: list[LabelledImage],
    unseen: list[LabelledImage],
    folder: Path,
    geometry: InputGeometry,
) -> FittedHeads:
    """Fit them; `rows` are both hospitals'. The line is fitted on `unseen`, which no member saw.

    Of one network that is its whole fold: half of the lesions are then the head's, half the line's.
    """
    if len(networks) == 1:
        unseen = [row for row in unseen if hashlib.sha256(row.lesion.encode()).digest()[0] % 2]
    apart = {row.lesion for row in unseen}
    heads, known_scores, outlier_scores = [], [], []
    outlying = Examples(np.empty(0), np.empty(0, str), np.empty(0, str))
    unseen_pixels = load_pixels(unseen, range(len(unseen)), folder, geometry)
    others = make_outliers(geometry, ensemble.seed, folder)
    others += skin_like(unseen_pixels[:: max(1, len(unseen_pixels) // SPOILT)], ensemble.seed)
    fitting = [outlier for outlier in others if outlier.part == "fit"]
    for network, recipe in zip(networks, ensemble.members, strict=True):
        picked = [row for row in rows if row.fold == recipe.data.fitted_fold and row.lesion not in apart][
            ::STRIDE
        ]
        pixels = load_pixels(picked, range(len(picked)), folder, geometry)

        def examples(shown: Pixels, kinds: list[str], groups: list[str]) -> Examples:
            views = np.concatenate([shown, captured(shown, recipe.augment, ensemble.seed)])  # noqa: B023
            measures = measure(network, views)  # noqa: B023
            return Examples(measures, np.array(kinds * 2), np.array(groups * 2))

        known = examples(pixels, [row.source for row in picked], [row.lesion for row in picked])
        outlying = examples(
            np.stack([outlier.pixels for outlier in fitting]),
            [outlier.kind for outlier in fitting],
            [outlier.source for outlier in fitting],
        )
        heads.append(fit_head(known, outlying))
        known_scores.append(heads[-1].score(measure(network, unseen_pixels)))
        outlier_scores.append(cross_fitted(known, outlying)[1])
    prepared = np.arange(len(outlying.kinds)) < len(outlying.kinds) // 2
    mean = np.mean(outlier_scores, axis=0)[prepared]
    line = fit_logistic(np.mean(known_scores, axis=0), mean, HEAD_PRIOR, outlying[prepared].weights)
    return FittedHeads(heads, *line)

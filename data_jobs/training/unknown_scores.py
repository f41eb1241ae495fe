"""Scores of how unlike the training images a feature is, from the literature: what ours was held against."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.probabilities import Floats, Labels
from data_jobs.training.scan import Scan
from data_jobs.training.unknown import WITHIN_SHRINKAGE, class_means, shrunk_covariance


def mahalanobis(train: NDArray[np.floating], labels: Labels, features: NDArray[np.floating]) -> Floats:
    """Least squared distance to a class mean under the shared covariance (Lee et al., NeurIPS 2018)."""
    means = class_means(train, labels)
    residuals = np.asarray(train, np.float64) - means[labels]
    precision = np.linalg.inv(shrunk_covariance(residuals, WITHIN_SHRINKAGE))
    distances = [np.einsum("nd,nd->n", (features - mean) @ precision, features - mean) for mean in means]
    result: Floats = np.min(distances, axis=0)
    return result


def neighbour_distance(train: NDArray[np.floating], features: NDArray[np.floating], k: int) -> Floats:
    """Distance of the unit feature to its k-th nearest training feature (Sun et al., ICML 2022).

    Raises ValueError with fewer than k training features.
    """
    if len(train) < k:
        raise ValueError(f"{len(train)} training features have no neighbour number {k}.")
    units = [np.asarray(f, np.float64) / np.linalg.norm(f, axis=1, keepdims=True) for f in (train, features)]
    similarity = units[1] @ units[0].T
    kth = np.partition(similarity, len(train) - k, axis=1)[:, len(train) - k]
    result: Floats = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * kth))
    return result


def virtual_logit(train: Scan, scan: Scan) -> Floats:
    """ViM (Wang et al., CVPR 2022): the scaled norm outside the principal space, less the energy.

    The last layer is found again from its inputs and outputs, to which it is linear. The
    principal space has half the width of the features.
    """
    features = np.asarray(train.bottleneck, np.float64)
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(design, np.asarray(train.logits, np.float64), rcond=None)
    origin = -np.linalg.pinv(solution[:-1].T) @ solution[-1]
    centred = features - origin
    _, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    rest = vectors[:, : features.shape[1] // 2]  # eigh sorts upwards: the lesser half
    scale = train.logits.max(1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()
    outside = np.linalg.norm((scan.bottleneck - origin) @ rest, axis=1)
    result: Floats = scale * outside - log_sum_exp(scan.logits)
    return result


def log_sum_exp(logits: NDArray[np.floating]) -> Floats:
    """The negative free energy of N×C logits (Liu et al., NeurIPS 2020)."""
    logits = np.asarray(logits, np.float64)
    top = logits.max(1)
    result: Floats = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return result

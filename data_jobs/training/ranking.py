"""Measures of how well scores rank: AUC, and the accuracy figures read from probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.probabilities import Floats, Labels


def area_under_curve(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """AUROC as the Mann-Whitney statistic, ties counted half; NaN without both kinds."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2.0) / (n * m))


def top_k_accuracy(probabilities: Floats, labels: Labels, k: int) -> float:
    """Share of images whose label is among the k most probable."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def class_recall(probabilities: Floats, labels: Labels, classes: int) -> Floats:
    """Recall of each class by the top answer; NaN for a class without images."""
    hit = probabilities.argmax(1) == labels
    return np.array([hit[labels == c].mean() if (labels == c).any() else np.nan for c in range(classes)])


def balanced_accuracy(probabilities: Floats, labels: Labels, classes: int) -> float:
    """Mean recall over the classes present."""
    return float(np.nanmean(class_recall(probabilities, labels, classes)))


def class_precision(probabilities: Floats, labels: Labels, classes: int) -> Floats:
    """Share of each class's top answers that are right; NaN for a class that is never the top answer."""
    answer = probabilities.argmax(1)
    hit = answer == labels
    return np.array([hit[answer == c].mean() if (answer == c).any() else np.nan for c in range(classes)])

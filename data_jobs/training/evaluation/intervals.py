"""95 % bootstrap intervals: lesions are drawn again, not images, for images of one lesion are alike."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import Floats, Labels
from serve_app.domain.diagnosis import TRAINED

RESAMPLES = 1000
Interval = tuple[float, float]


def bootstrap_intervals(predictions: Predictions, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Percentile intervals (Efron and Tibshirani 1993, 13.3) of the figures of the nine classes.

    Keys: top1, top3, balanced_accuracy, melanoma_auc, ece, and by diagnosis recall, precision
    and auc. A diagnosis without a first answer in a resample has no precision there, and one
    without any image no recall: such resamples are left out of its interval. The ECE is a sum of
    absolute values, to which every resample adds noise: its interval lies high.
    """
    labels, nine = predictions.labels, predictions.nine
    weights = resampled_weights(predictions.lesions, resamples, seed)
    best = np.argsort(-nine, axis=1, kind="stable")
    answer, hit = best[:, 0], best[:, 0] == labels
    in_three = (best[:, :3] == labels[:, None]).any(1)
    total = weights.sum(1)
    recall = np.stack([_share(weights, hit, labels == c) for c in range(len(TRAINED))])
    precision = np.stack([_share(weights, hit, answer == c) for c in range(len(TRAINED))])
    eight = predictions.eight
    auc = [weighted_auc(eight[:, c], labels == c, weights) for c in range(len(TRAINED))]
    return {
        "resamples": resamples,
        "top1": interval(weights @ hit / total),
        "top3": interval(weights @ in_three / total),
        "balanced_accuracy": interval(np.nanmean(recall, axis=0)),
        "melanoma_auc": interval(weighted_auc(nine[:, MELANOMA], labels == MELANOMA, weights)),
        "ece": interval(weighted_calibration_error(nine, labels, weights)),
        "recall": _by_diagnosis(recall),
        "precision": _by_diagnosis(precision),
        "auc": _by_diagnosis(auc),
    }


def resampled_weights(lesions: list[str], resamples: int, seed: int) -> Floats:
    """R×N: how often each image is in each resample, as its lesion was drawn."""
    _, inverse = np.unique(lesions, return_inverse=True)
    count = int(inverse.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return np.asarray(drawn[:, inverse], np.float64)


def weighted_auc(scores: Floats, positive: NDArray[np.bool_], weights: Floats) -> Floats:
    """AUROC of every resample, ties counted half; NaN where one kind was not drawn."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0.0)
    ordered, kind = weights[:, order], positive[order]
    up = np.add.reduceat(ordered * kind, starts, axis=1)
    down = np.add.reduceat(ordered * ~kind, starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2.0
    pairs = up.sum(1) * down.sum(1)
    result: Floats = np.where(pairs > 0, (up * below).sum(1) / np.where(pairs > 0, pairs, 1.0), np.nan)
    return result


def weighted_calibration_error(
    probabilities: Floats, labels: Labels, weights: Floats, bins: int = 15
) -> Floats:
    """`probabilities.calibration_error` of every resample."""
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    error = np.zeros(len(weights))
    for b in range(bins):
        inside = index == b
        error += np.abs(weights[:, inside] @ gap[inside])
    result: Floats = error / weights.sum(1)
    return result


def interval(values: Floats) -> Interval:
    """The middle 95 % of the resampled values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return round(float(low), 4), round(float(high), 4)


def _share(weights: Floats, hit: NDArray[np.bool_], among: NDArray[np.bool_]) -> Floats:
    """Share of hits among some images in every resample; NaN where none of them was drawn."""
    drawn = weights @ among
    result: Floats = np.where(drawn > 0, weights @ (hit & among) / np.where(drawn > 0, drawn, 1.0), np.nan)
    return result


def _by_diagnosis(values: NDArray[np.float64] | list[Floats]) -> dict[str, Interval]:
    return {d.value: interval(v) for d, v in zip(TRAINED, values, strict=True)}

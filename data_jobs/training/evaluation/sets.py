"""Prediction sets: their sizes, and whether the coverage found is what the promise allows."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from data_jobs.training.conformal import class_coverage, prediction_sets
from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.probabilities import Floats
from serve_app.domain.diagnosis import TRAINED


def set_figures(
    predictions: Predictions, thresholds: Floats, coverage: float, calibration_images: Mapping[str, int]
) -> dict[str, Any]:
    """Coverage of every class beside the range that chance allows, and the sizes of the sets.

    `calibration_images` are those that each class's threshold was found on.
    """
    labels = predictions.labels
    sets = prediction_sets(predictions.eight, thresholds)
    size = sets.sum(1)
    found = class_coverage(sets, labels)
    classes = {}
    for index, diagnosis in enumerate(TRAINED):
        images, covered = int((labels == index).sum()), int(sets[labels == index, index].sum())
        low, high = coverage_range(calibration_images[diagnosis.value], images, coverage)
        classes[diagnosis.value] = {
            "calibration_images": calibration_images[diagnosis.value],
            "images": images,
            "covered": covered,
            "coverage": round(float(found[index]), 4),
            "range": [low, high],
            "within_range": low <= covered <= high,
        }
    return {
        "nominal_coverage": coverage,
        "coverage": round(float(sets[np.arange(len(labels)), labels].mean()), 4),
        "classes": classes,
        "mean_size": round(float(size.mean()), 3),
        "share_of_one": round(float((size == 1).mean()), 4),
        "share_empty": round(float((size == 0).mean()), 4),
    }


def coverage_range(
    calibration_images: int, images: int, coverage: float, share: float = 0.95
) -> tuple[int, int]:
    """Fewest and most of `images` new ones that are covered, in the middle `share` of all splits.

    With the k-th smallest of n calibration scores as threshold, coverage over splits is
    Beta(n + 1 - k, k) and the count of covered images beta-binomial (Vovk, ACML 2012, prop. 2a;
    Angelopoulos and Bates 2023, 3.2): a class of few calibration images may fall far from its
    promise by chance alone. It takes images as independent, which those of one lesion are not.
    """
    k = math.floor((1.0 - coverage) * (calibration_images + 1) + 1e-9)
    if k == 0:
        return images, images
    a, b = calibration_images + 1 - k, k
    mass = [
        math.exp(_log_choose(images, x) + _log_beta(x + a, images - x + b) - _log_beta(a, b))
        for x in range(images + 1)
    ]
    below = np.cumsum(mass)
    tail = (1.0 - share) / 2.0
    low = int(np.flatnonzero(below > tail)[0])
    high = int(np.flatnonzero(below >= 1.0 - tail - 1e-12)[0])
    return low, high


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

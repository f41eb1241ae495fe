"""Class-conditional split conformal prediction sets (Vovk, ACML 2012): their thresholds, sizes and coverage."""

from __future__ import annotations

from collections.abc import Mapping
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom

from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.probabilities import Floats, Labels
from serve_app.domain.diagnosis import TRAINED

#: A class of fewer calibration images than this is rare: 19 images of 16 lesions cannot place a 5 % quantile.
RARE_IMAGES = 150


def conformal_threshold(scores: NDArray[np.floating], coverage: float) -> float:
    """The threshold t for which a new p(y) >= t with probability at least `coverage`.

    `scores` are the calibrated p(y) of the images of class y. t is the k-th smallest of n with
    k = floor((1 - coverage) * (n + 1)): under exchangeability the new score falls below it
    with probability at most k / (n + 1). With k = 0 (fewer than 1 / (1 - coverage) - 1
    images) no finite threshold keeps the promise, and t = 0: the class is in every set.
    """
    k = math.floor((1.0 - coverage) * (len(scores) + 1) + 1e-9)
    return 0.0 if k == 0 else float(np.sort(scores)[k - 1])


def conformal_thresholds(probabilities: Floats, labels: Labels, coverage: float) -> Floats:
    """One threshold a class from N×C calibrated probabilities.

    A rare class is held to no higher threshold than the rare classes are together (Ding et al., NeurIPS
    2023, cluster such classes): its own quantile hangs on one image, and may only be too high at a patient's cost.
    """
    own_class = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=probabilities.shape[1])
    thresholds = np.array(
        [conformal_threshold(own_class[labels == c], coverage) for c in range(probabilities.shape[1])]
    )
    rare = counts < RARE_IMAGES
    if rare[labels].any():
        pooled = conformal_threshold(own_class[rare[labels]], coverage)
        thresholds[rare] = np.minimum(thresholds[rare], pooled)
    return thresholds


def set_figures(
    predictions: Predictions, thresholds: Floats, coverage: float, calibration_images: Mapping[str, int]
) -> dict[str, Any]:
    """Coverage of every class beside the range that chance allows, and the sizes of the sets.

    `calibration_images` are those that each class's threshold was found on.
    """
    labels = predictions.labels
    sets = predictions.eight >= thresholds
    size = sets.sum(1)
    classes = {}
    for index, diagnosis in enumerate(TRAINED):
        images, covered = int((labels == index).sum()), int(sets[labels == index, index].sum())
        low, high = coverage_range(calibration_images[diagnosis.value], images, coverage)
        classes[diagnosis.value] = {
            "calibration_images": calibration_images[diagnosis.value],
            "images": images,
            "covered": covered,
            "coverage": round(covered / images, 4) if images else float("nan"),
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
    found = betabinom(images, calibration_images + 1 - k, k)
    tail = (1.0 - share) / 2.0
    return int(found.ppf(tail)), int(found.ppf(1.0 - tail))

"""Class-conditional split conformal prediction sets (Vovk, ACML 2012)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.probabilities import Floats, Labels

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


def prediction_sets(probabilities: Floats, thresholds: Floats) -> NDArray[np.bool_]:
    """N×C membership: y is in the set when p(y) >= threshold[y]."""
    return probabilities >= thresholds


def class_coverage(sets: NDArray[np.bool_], labels: Labels) -> Floats:
    """Share of each class's images whose set holds their class; NaN for a class without images."""
    classes = range(sets.shape[1])
    held = [sets[labels == c, c] for c in classes]
    return np.array([h.mean() if len(h) else np.nan for h in held])

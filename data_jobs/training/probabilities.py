"""From logits to calibrated probabilities (temperature and prior shift, fitted by likelihood), and how good they are."""

from __future__ import annotations

from collections.abc import Sequence
import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn import metrics

from deployments.classifier.calibration import softmax as served_softmax

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def rounded(value: float | np.floating, digits: int = 4) -> float:
    """A figure for reading."""
    return round(float(value), digits)


def quantiles(
    values: NDArray[np.floating] | Sequence[float], at: Sequence[float], digits: int = 4
) -> dict[str, float]:
    """Quantiles, rounded for reading."""
    return {str(q): rounded(np.quantile(values, q), digits) for q in at}


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Row-wise softmax of N×C logits / T."""
    return served_softmax(np.asarray(logits, np.float64), temperature)


def log_loss(probabilities: Floats, labels: Labels) -> float:
    """Mean negative log-likelihood, in nats."""
    picked = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(picked, 1e-12, 1.0)).mean())


def fit_temperature(logits: NDArray[np.floating], labels: Labels) -> float:
    """T of least log-loss, 0.1 to 10 (Guo et al., ICML 2017)."""

    def loss(log_temperature: float) -> float:
        return log_loss(softmax(logits, math.exp(log_temperature)), labels)

    found = minimize_scalar(loss, bounds=(math.log(0.1), math.log(10.0)), options={"xatol": 1e-5})
    return math.exp(float(found.x))


#: What the flattest prior may cost of the share of right first answers.
TOP1_TOLERANCE = 0.005
#: The shifts that are tried.
PRIOR_SHIFTS = np.linspace(0.0, 1.2, 13)


def fit_prior_shift(logits: NDArray[np.floating], labels: Labels, prior: Floats) -> tuple[float, float]:
    """The least `shift` of softmax((logits + shift * log prior) / T) that keeps the first answers right, and its T.

    A network trained with a tempered prior (class-balanced sampling, logit adjustment) answers as if
    rare diagnoses were common. Restoring the archive's prior in full fits the archive best, and
    hides rare malignant diagnoses behind common benign ones; the archive's prior is no clinic's
    anyway. So of the shifts whose share of right first answers is within TOP1_TOLERANCE of the
    best one's, the least; T is fitted for each (Guo et al., ICML 2017).
    Returns (shift, temperature).
    """
    fits = []
    for shift in PRIOR_SHIFTS:
        moved = np.asarray(logits, np.float64) + float(shift) * np.log(prior)
        right = float((moved.argmax(1) == labels).mean())
        fits.append((right, float(shift), fit_temperature(moved, labels)))
    best = max(right for right, _, _ in fits)
    return next((shift, t) for right, shift, t in fits if right >= best - TOP1_TOLERANCE)


def calibration_error(probabilities: Floats, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error of the top answer, equal-width bins (Guo et al., ICML 2017, eq. 3)."""
    return float(weighted_calibration_error(probabilities, labels, np.ones((1, len(labels))), bins)[0])


def weighted_calibration_error(
    probabilities: Floats, labels: Labels, weights: Floats, bins: int = 15
) -> Floats:
    """`calibration_error` under each of R weightings of the images, R×N."""
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    error = np.stack([np.abs(weights[:, index == b] @ gap[index == b]) for b in range(bins)]).sum(0)
    return np.asarray(error / weights.sum(1))


def area_under_curve(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """AUROC, ties counted half; NaN without both kinds."""
    both = positive.any() and not positive.all()
    return float(metrics.roc_auc_score(positive, scores)) if both else math.nan


def top_k_accuracy(probabilities: Floats, labels: Labels, k: int) -> float:
    """Share of images whose label is among the k most probable."""
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(1).mean())


def balanced_accuracy(probabilities: Floats, labels: Labels) -> float:
    """Mean over the classes present of the share of their images that are the top answer."""
    hit = probabilities.argmax(1) == labels
    return float(np.mean([hit[labels == c].mean() for c in np.unique(labels)]))

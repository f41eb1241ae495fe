"""From logits to calibrated probabilities: temperature and prior shift, fitted by likelihood.

numpy only, like every statistic of this package: what is fitted here is checked without torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def softmax(logits: NDArray[np.floating], temperature: float = 1.0) -> Floats:
    """Row-wise softmax of N×C logits / T."""
    scaled = np.asarray(logits, np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
    result: Floats = exponentials / exponentials.sum(1, keepdims=True)
    return result


def log_loss(probabilities: Floats, labels: Labels) -> float:
    """Mean negative log-likelihood, in nats."""
    picked = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.clip(picked, 1e-12, 1.0)).mean())


def fit_temperature(logits: NDArray[np.floating], labels: Labels) -> float:
    """T of least log-loss (Guo et al., ICML 2017), by golden-section search in log T over 0.1 to 10."""
    low, high = np.log(0.1), np.log(10.0)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-5:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        losses = [log_loss(softmax(logits, float(np.exp(t))), labels) for t in (left, right)]
        low, high = (low, right) if losses[0] < losses[1] else (left, high)
    return float(np.exp((low + high) / 2.0))


#: What the flattest prior may cost of the share of right first answers.
TOP1_TOLERANCE = 0.005


def prior_shifts() -> Floats:
    """The shifts that are tried, 0 to 1.2 in steps of 0.1."""
    return np.linspace(0.0, 1.2, 13)


def fit_prior_shift(
    logits: NDArray[np.floating], labels: Labels, prior: Floats, shifts: Floats
) -> tuple[float, float]:
    """The least `shift` of softmax((logits + shift * log prior) / T) that keeps the first answers right, and its T.

    A network trained with a tempered prior (class-balanced sampling, logit adjustment) answers as if
    rare diagnoses were common. Restoring the archive's prior in full fits the archive best, and
    hides rare malignant diagnoses behind common benign ones; the archive's prior is no clinic's
    anyway. So of the shifts whose share of right first answers is within TOP1_TOLERANCE of the
    best one's, the least; T is fitted for each (Guo et al., ICML 2017).
    Returns (shift, temperature).
    """
    fits = []
    for shift in np.sort(shifts):
        moved = np.asarray(logits, np.float64) + float(shift) * np.log(prior)
        right = float((moved.argmax(1) == labels).mean())
        fits.append((right, float(shift), fit_temperature(moved, labels)))
    best = max(right for right, _, _ in fits)
    return next((shift, t) for right, shift, t in fits if right >= best - TOP1_TOLERANCE)


def calibration_error(probabilities: Floats, labels: Labels, bins: int = 15) -> float:
    """Expected calibration error of the top answer, equal-width bins (Guo et al., ICML 2017, eq. 3)."""
    confidence = probabilities.max(1)
    hit = probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        if (inside := index == b).any():
            total += inside.mean() * abs(float(hit[inside].mean()) - float(confidence[inside].mean()))
    return float(total)

"""Curves that the card draws: melanoma sensitivity against specificity, and reliability."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.operating_points import by_lesion, lower_bound
from data_jobs.training.probabilities import Floats
from data_jobs.training.ranking import area_under_curve

#: Sensitivities at which the specificity is told.
READINGS = (0.80, 0.85, 0.90, 0.95, 0.975, 0.99, 1.0)
BINS = 15


def melanoma_curve(predictions: Predictions) -> dict[str, Any]:
    """Sensitivity and specificity of p(MEL) by lesion, at every threshold that changes the sensitivity.

    As for the operating points, a melanoma counts by its lowest image and any other lesion by its
    highest. It describes the fold it is measured on; no threshold is taken from it.
    """
    labels = predictions.labels
    scores, positive = by_lesion(predictions.eight[:, MELANOMA], labels == MELANOMA, predictions.lesions)
    thresholds, sensitivity, specificity = sensitivity_specificity(scores, positive)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    readings = []
    for wanted in READINGS:
        at = int(np.flatnonzero(sensitivity >= wanted - 1e-12)[0])
        hits = round(float(sensitivity[at]) * positives)
        readings.append(
            {
                "threshold": round(float(thresholds[at]), 6),
                "hits": hits,
                "positives": positives,
                "sensitivity": round(hits / positives, 4),
                "lower_bound": round(lower_bound(hits, positives), 4),
                "negatives": negatives,
                "specificity": round(float(specificity[at]), 4),
            }
        )
    return {
        "auc": round(area_under_curve(scores, positive), 4),
        "readings": readings,
        "threshold": [round(float(t), 5) for t in thresholds],
        "sensitivity": [round(float(s), 4) for s in sensitivity],
        "specificity": [round(float(s), 4) for s in specificity],
    }


def sensitivity_specificity(scores: Floats, positive: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """Thresholds, falling, with the sensitivity and specificity of `score >= threshold`.

    One threshold for every distinct score of a positive. Raises ValueError without both kinds.
    """
    if positive.all() or not positive.any():
        raise ValueError("A curve needs positives and negatives.")
    thresholds = np.unique(scores[positive])[::-1]
    hits, benign = np.sort(scores[positive]), np.sort(scores[~positive])
    sensitivity = 1.0 - np.searchsorted(hits, thresholds, side="left") / len(hits)
    specificity = np.searchsorted(benign, thresholds, side="left") / len(benign)
    return thresholds, sensitivity, specificity


def reliability(predictions: Predictions) -> dict[str, list[dict[str, float]]]:
    """Told against found, in 15 equal bins: the first answer's probability, and p(MEL)."""
    nine, labels = predictions.nine, predictions.labels
    return {
        "first_answer": reliability_bins(nine.max(1), nine.argmax(1) == labels),
        "melanoma": reliability_bins(predictions.eight[:, MELANOMA], labels == MELANOMA),
    }


def reliability_bins(told: Floats, came_true: NDArray[np.bool_], bins: int = BINS) -> list[dict[str, float]]:
    """Mean probability told and share that came true, of every bin that holds an image."""
    index = np.minimum((told * bins).astype(int), bins - 1)
    return [
        {
            "images": int(inside.sum()),
            "told": round(float(told[inside].mean()), 4),
            "found": round(float(came_true[inside].mean()), 4),
        }
        for b in range(bins)
        if (inside := index == b).any()
    ]

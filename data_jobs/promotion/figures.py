"""Accuracy of one model on confirmed cases, and the subgroups it is looked at by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.operating_points import by_lesion, measure_threshold, point_score
from data_jobs.training.probabilities import (
    Floats,
    Labels,
    area_under_curve,
    balanced_accuracy,
    calibration_error,
    top_k_accuracy,
)
from model_store.manifest import OperatingPoint
from serve_app.domain.diagnosis import TRAINED, Diagnosis

MELANOMA = TRAINED.index(Diagnosis.MEL)


@dataclass(frozen=True, slots=True)
class Flags:
    """Which lesions an operating point flags, in the same order for every model: L booleans each."""

    flagged: NDArray[np.bool_]
    positive: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Figures:
    """Accuracy with UNK as a wrong answer; sensitivity and specificity of the point `melanoma`, by lesion."""

    images: int
    top1: float
    top3: float
    balanced_accuracy: float
    melanoma_auc: float
    ece: float
    melanoma_lesions: int
    melanoma_misses: int
    melanoma_sensitivity: float
    melanoma_sensitivity_bound: float
    melanoma_specificity: float


def among_eight(nine: Floats) -> Floats:
    """N×9 with UNK to N×8 without: what the operating points are thresholds on."""
    eight = nine[:, :8]
    return np.asarray(eight / eight.sum(1, keepdims=True))


def flag_lesions(
    nine: Floats, labels: Labels, rows: Sequence[LabelledImage], point: OperatingPoint
) -> tuple[Floats, Flags]:
    """One score a lesion, and whether the point flags it."""
    positive = np.isin(labels, [TRAINED.index(d) for d in point.diagnoses])
    scores, positives = by_lesion(
        point_score(among_eight(nine), point.diagnoses), positive, [row.lesion for row in rows]
    )
    return scores, Flags(scores >= point.threshold, positives)


def measure(
    nine: Floats, labels: Labels, rows: Sequence[LabelledImage], point: OperatingPoint
) -> tuple[Figures, Flags]:
    """Figures of N×9 probabilities; the rows must have melanomas and others."""
    scores, flags = flag_lesions(nine, labels, rows, point)
    found = measure_threshold(scores, flags.positive, point.threshold)
    figures = Figures(
        images=len(labels),
        top1=top_k_accuracy(nine, labels, 1),
        top3=top_k_accuracy(nine, labels, 3),
        balanced_accuracy=balanced_accuracy(nine, labels, len(TRAINED)),
        melanoma_auc=area_under_curve(nine[:, MELANOMA], labels == MELANOMA),
        ece=calibration_error(nine, labels),
        melanoma_lesions=found.positives,
        melanoma_misses=found.misses,
        melanoma_sensitivity=found.sensitivity,
        melanoma_sensitivity_bound=found.lower_bound,
        melanoma_specificity=found.specificity,
    )
    return figures, flags


def subgroups(rows: Sequence[LabelledImage]) -> dict[str, NDArray[np.bool_]]:
    """Which rows belong to which sex, age band, body site and source."""
    kinds = {
        "sex": [row.sex or "unknown" for row in rows],
        "age": [_age_band(row.age_approx) for row in rows],
        "site": [row.anatom_site_general or "unknown" for row in rows],
        "source": ["HAM10000" if row.lesion.startswith("HAM_") else "other" for row in rows],
    }
    return {
        f"{kind}: {value}": np.array([v == value for v in values])
        for kind, values in kinds.items()
        for value in sorted(set(values))
    }


def _age_band(age: int | None) -> str:
    if age is None:
        return "unknown"
    return "under 40" if age < 40 else "40 to 59" if age < 60 else "60 or more"

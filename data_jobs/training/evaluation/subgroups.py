"""Accuracy of the people, places and files that the archive tells apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.evaluation.predictions import Predictions

#: Groups with fewer images are left out: their figures would be noise.
SMALLEST = 30


def subgroup_figures(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Figures (nine classes) by image source, aspect, resolution, confirmation, sex, age and body site."""
    rows = predictions.rows
    values = {
        "source": ["HAM10000" if ham else "other" for ham in predictions.of_ham10000],
        "aspect": [row.aspect for row in rows],
        "short side": ["under 224" if min(row.width, row.height) < 224 else "224 or more" for row in rows],
        "confirmed by": [row.diagnosis_confirm_type or "unknown" for row in rows],
        "sex": [row.sex or "unknown" for row in rows],
        "age": [_age_band(row.age_approx) for row in rows],
        "site": [row.anatom_site_general or "unknown" for row in rows],
    }
    groups: dict[str, NDArray[np.bool_]] = {
        f"{name}: {value}": np.array([v == value for v in found])
        for name, found in values.items()
        for value in sorted(set(found))
    }
    nine, labels = predictions.nine, predictions.labels
    return {
        name: accuracy_figures(nine[picked], labels[picked])
        for name, picked in groups.items()
        if picked.sum() >= SMALLEST
    }


def _age_band(age: int | None) -> str:
    if age is None:
        return "unknown"
    return "under 40" if age < 40 else "40 to 59" if age < 60 else "60 or more"

"""Accuracy, per diagnosis and over all: by image, and by lesion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import Floats, Labels, calibration_error, log_loss
from data_jobs.training.ranking import (
    area_under_curve,
    balanced_accuracy,
    class_precision,
    class_recall,
    top_k_accuracy,
)
from serve_app.domain.diagnosis import TRAINED, Diagnosis

CLASSES = len(TRAINED)


def accuracy_figures(probabilities: Floats, labels: Labels) -> dict[str, float]:
    """Figures of N×9 (or N×8) probabilities; a first answer of UNK is wrong."""
    return {
        "images": len(labels),
        "top1": round(top_k_accuracy(probabilities, labels, 1), 4),
        "top3": round(top_k_accuracy(probabilities, labels, 3), 4),
        "balanced_accuracy": round(balanced_accuracy(probabilities, labels, CLASSES), 4),
        "melanoma_auc": round(area_under_curve(probabilities[:, MELANOMA], labels == MELANOMA), 4),
        "ece": round(calibration_error(probabilities, labels), 4),
        "log_loss": round(log_loss(probabilities, labels), 4),
    }


def diagnosis_figures(predictions: Predictions) -> dict[str, Any]:
    """Images, recall, precision (nine classes), one-vs-rest AUC (eight) and confusion row of every diagnosis."""
    labels, nine, eight = predictions.labels, predictions.nine, predictions.eight
    return {
        "images_a_class": {d.value: int((labels == i).sum()) for i, d in enumerate(TRAINED)},
        "recall": by_diagnosis(class_recall(nine, labels, CLASSES)),
        "precision": by_diagnosis(class_precision(nine, labels, CLASSES)),
        "auc": by_diagnosis(np.array([area_under_curve(eight[:, i], labels == i) for i in range(CLASSES)])),
        "confusion": {
            d.value: row.tolist() for d, row in zip(TRAINED, confusion_matrix(nine, labels), strict=True)
        },
    }


def by_diagnosis(values: Floats) -> dict[str, float]:
    """One value a trained diagnosis, by its code."""
    return {d.value: round(float(v), 4) for d, v in zip(TRAINED, values, strict=True)}


def confusion_matrix(nine: Floats, labels: Labels) -> NDArray[np.int64]:
    """8×9 counts: the diagnosis in the archive by the first answer."""
    matrix = np.zeros((CLASSES, len(Diagnosis)), np.int64)
    np.add.at(matrix, (labels, nine.argmax(1)), 1)
    return matrix


def lesion_predictions(predictions: Predictions) -> Predictions:
    """One answer a lesion: the mean of its images' probabilities and scores, under its first image's row.

    A lesion with a diagnosis for one image and another for the next counts once for each.
    """
    keys = [f"{row.lesion} {row.diagnosis}" for row in predictions.rows]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    nine = np.zeros((len(first), predictions.nine.shape[1]))
    scores = np.zeros(len(first))
    np.add.at(nine, inverse, predictions.nine)
    np.add.at(scores, inverse, predictions.scores)
    rows = [predictions.rows[i] for i in first]
    return Predictions(rows, nine / counts[:, None], scores / counts)


def lesion_figures(predictions: Predictions) -> dict[str, float]:
    """`accuracy_figures` by lesion; `images` is replaced by `lesions`."""
    lesions = lesion_predictions(predictions)
    figures = accuracy_figures(lesions.nine, lesions.labels)
    return {"lesions": figures.pop("images"), **figures}


def lesion_diagnosis_figures(predictions: Predictions) -> dict[str, dict[str, float]]:
    """Lesions, recall and precision of every diagnosis, by lesion."""
    figures = diagnosis_figures(lesion_predictions(predictions))
    return {
        "lesions_a_class": figures["images_a_class"],
        "recall": figures["recall"],
        "precision": figures["precision"],
    }

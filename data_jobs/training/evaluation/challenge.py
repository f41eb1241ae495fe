"""The figures as the ISIC challenges count them, held against the challenges' own scoring code."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_jobs.training.evaluation.official import official_scores
from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions
from data_jobs.training.probabilities import Floats, Labels
from data_jobs.training.ranking import area_under_curve, balanced_accuracy, top_k_accuracy
from serve_app.domain.diagnosis import TRAINED, Diagnosis

#: ISIC 2018 task 3: actinic keratosis and squamous cell carcinoma in situ are one class, AKIEC.
SEVEN = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_MERGED = {Diagnosis.AK: "AKIEC", Diagnosis.SCC: "AKIEC"}
_SEVEN_OF_EIGHT = np.array([SEVEN.index(_MERGED.get(d, d.value)) for d in TRAINED])


def challenge_figures(predictions: Predictions) -> dict[str, Any]:
    """Eight classes over the whole fold, seven over its HAM10000 images; UNK first counts as wrong in both."""
    ham = predictions[predictions.of_ham10000]
    refused = ham.nine.argmax(1) == UNKNOWN
    return {
        "isic2019_eight": scored(
            predictions.eight,
            predictions.labels,
            predictions.nine.argmax(1) == UNKNOWN,
            tuple(d.value for d in TRAINED),
        ),
        "isic2018_seven_ham10000": scored(
            merge_to_seven(ham.eight), _SEVEN_OF_EIGHT[ham.labels], refused, SEVEN
        ),
    }


def merge_to_seven(eight: Floats) -> Floats:
    """N×7 probabilities in the order of SEVEN: p(AKIEC) = p(AK) + p(SCC)."""
    seven = np.zeros((len(eight), len(SEVEN)))
    for index, target in enumerate(_SEVEN_OF_EIGHT):
        seven[:, target] += eight[:, index]
    return seven


def scored(known: Floats, labels: Labels, refused: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """Our figures and the official ones of the same N×C table.

    A refused image's row is all zeros: the official code calls such a tie undecided, and so
    wrong, and in every AUC it ranks last.
    """
    table = np.where(refused[:, None], 0.0, known)
    # UNK as one more class: argmax of a row of zeros must not be the first diagnosis.
    answers = np.concatenate([table, refused[:, None].astype(np.float64)], axis=1)
    auc = {name: area_under_curve(table[:, c], labels == c) for c, name in enumerate(names)}
    ours: dict[str, Any] = {
        "images": len(labels),
        "refused": int(refused.sum()),
        "top1": round(top_k_accuracy(answers, labels, 1), 4),
        "balanced_accuracy": round(balanced_accuracy(answers, labels, len(names)), 4),
        "auc": {name: round(value, 4) for name, value in auc.items()},
        "mean_auc": round(float(np.nanmean(list(auc.values()))), 4),
    }
    return ours | {"official": official_scores(table, labels, names)}

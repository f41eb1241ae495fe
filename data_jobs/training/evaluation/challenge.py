"""The figures as the ISIC challenges count them, held against the challenges' own scoring code.

That code, `isic-challenge-scoring`, runs in a process of its own (`python -m data_jobs.training.evaluation.challenge`,
JSON in and out), because importing it replaces parts of Python's `zipfile`, which numpy reads models with.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
import json
import subprocess
import sys
from typing import Any

import numpy as np

from data_jobs.training.evaluation.predictions import UNKNOWN, Predictions
from data_jobs.training.probabilities import (
    Floats,
    Labels,
    area_under_curve,
    balanced_accuracy,
    top_k_accuracy,
)
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


PACKAGE = "isic_challenge_scoring"
TIMEOUT_S = 900


def official_scores(table: Floats, labels: Labels, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Balanced accuracy, and by class AUC, average precision and AUC above 80 % sensitivity.

    `table` is N×C; a row without one highest value is undecided. None where the package, extra
    `challenge`, is not installed, and where a class has no image, which it cannot score. Raises
    RuntimeError when the package fails.
    """
    if find_spec(PACKAGE) is None or len(np.unique(labels)) < len(names):
        return None
    question = json.dumps({"table": table.tolist(), "labels": labels.tolist(), "names": names})
    # The package was last released for pandas 1: its warnings tell us nothing.
    command = [sys.executable, "-W", "ignore", "-m", __name__]
    ran = subprocess.run(
        command, input=question, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    if ran.returncode != 0:
        raise RuntimeError(f"isic-challenge-scoring failed: {ran.stderr[-1000:]}")
    return dict(json.loads(ran.stdout))


def score(table: Floats, labels: Labels, names: list[str]) -> dict[str, Any]:
    """What `official_scores` returns, in this process.

    The package's metrics are called directly: its reader of CSV files needs a pandas before 3.
    """
    from isic_challenge_scoring import metrics  # noqa: PLC0415 - both come with the extra
    import pandas as pd  # noqa: PLC0415

    truth = pd.DataFrame(np.eye(len(names))[labels], columns=names)
    told = pd.DataFrame(table, columns=names)
    weights = pd.Series(np.ones(len(labels)))

    def of_class(name: str) -> dict[str, float]:
        pair = truth[name], told[name], weights
        return {
            "auc": round(float(metrics.auc(*pair)), 4),
            "ap": round(float(metrics.average_precision(*pair)), 4),
            "auc_sens_80": round(float(metrics.auc_above_sensitivity(*pair, 0.80)), 4),
        }

    classes = {name: of_class(name) for name in names}
    return {
        "package": f"isic-challenge-scoring {version('isic-challenge-scoring')}",
        "balanced_accuracy": round(float(metrics.balanced_multiclass_accuracy(truth, told, weights)), 4),
        "mean_auc": round(float(np.mean([c["auc"] for c in classes.values()])), 4),
        "classes": classes,
    }


def main() -> None:
    """Score what stands on standard input."""
    asked = json.load(sys.stdin)
    found = score(np.array(asked["table"]), np.array(asked["labels"], np.int64), asked["names"])
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

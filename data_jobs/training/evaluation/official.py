"""`isic-challenge-scoring`, the code that scored the ISIC challenges, on our predictions.

It runs in a process of its own (`python -m data_jobs.training.evaluation.official`, JSON in and
out), because importing it replaces parts of Python's `zipfile`, which numpy reads models with.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
import json
import subprocess
import sys
from typing import Any

import numpy as np

from data_jobs.training.probabilities import Floats, Labels

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

"""What the served code answered to labelled images: the one table that every figure is read from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow as pa
import pyarrow.parquet as pq

from data_jobs.training.dataset import LabelledImage, labels_of, of_ham10000
from data_jobs.training.probabilities import Floats, Labels
from deployments.classifier.calibration import Calibrator
from model_store.session import Outputs
from serve_app.domain.assessment import Classification
from serve_app.domain.diagnosis import TRAINED, Diagnosis

#: The test fold, each image as it was judged.
PREDICTIONS_NAME = "predictions.parquet"
#: The calibration fold, as served: what the thresholds follow from.
CALIBRATION_NAME = "calibration.parquet"
MELANOMA = TRAINED.index(Diagnosis.MEL)
UNKNOWN = len(TRAINED)


@dataclass(frozen=True, slots=True)
class Predictions:
    """N labelled images with their nine probabilities, N×9 in the order of Diagnosis, and UNK scores, N."""

    rows: list[LabelledImage]
    nine: Floats
    scores: Floats

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.rows)

    def __getitem__(self, picked: NDArray[np.bool_]) -> Predictions:
        """The images that are picked."""
        rows = [row for row, wanted in zip(self.rows, picked.tolist(), strict=True) if wanted]
        return Predictions(rows, self.nine[picked], self.scores[picked])

    @property
    def labels(self) -> Labels:
        """Index in TRAINED of every image's diagnosis."""
        return labels_of(self.rows)

    @property
    def eight(self) -> Floats:
        """N×8 probabilities of the trained diagnoses, as if UNK were no answer; equal where p(UNK) is 1."""
        return known_eight(self.nine)

    @property
    def lesions(self) -> list[str]:
        """The lesion of every image."""
        return [row.lesion for row in self.rows]

    @property
    def of_ham10000(self) -> NDArray[np.bool_]:
        """Which images come from HAM10000."""
        return of_ham10000(self.rows)


def known_eight(nine: Floats) -> Floats:
    """N×9 with UNK to N×8 without: what the operating points and the sets are thresholds on."""
    known = nine[:, :UNKNOWN]
    total = known.sum(1, keepdims=True)
    return np.where(total > 0.0, known / np.where(total > 0.0, total, 1.0), 1.0 / UNKNOWN)


def classify(calibrator: Calibrator, scan: Outputs) -> list[Classification]:
    """What a network gave for N images as N classifications: the one place where these jobs ask the served code."""
    answers = []
    for start in range(0, len(scan.logits), 256):
        answers += calibrator.classify(scan.part(slice(start, start + 256)))
    return answers


def tabulate(answers: Sequence[Classification]) -> tuple[Floats, Floats]:
    """N×9 probabilities in the order of Diagnosis, and N out-of-distribution scores."""
    nine = np.array([[a.probabilities[d] for d in Diagnosis] for a in answers])
    return nine, np.array([a.ood_score for a in answers])


def served(calibrator: Calibrator, scan: Outputs) -> tuple[Floats, Floats]:
    """As `tabulate`, of a scan."""
    return tabulate(classify(calibrator, scan))


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write isic_id, fold, truth, the nine probabilities and the UNK score; float32 keeps thresholds exact enough."""
    columns: dict[str, pa.Array] = {
        "isic_id": pa.array([row.isic_id for row in predictions.rows]),
        "fold": pa.array([row.fold for row in predictions.rows], pa.int8()),
        "truth": pa.array([row.diagnosis.value for row in predictions.rows]).dictionary_encode(),
    }
    for index, diagnosis in enumerate(Diagnosis):
        columns[diagnosis.value] = pa.array(predictions.nine[:, index].astype(np.float32))
    columns["ood_score"] = pa.array(predictions.scores.astype(np.float32))
    pq.write_table(pa.table(columns), path, compression="zstd")

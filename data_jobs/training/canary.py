"""The canary of a model folder: a drawn lesion, and what the model answers to it where it was evaluated.

`python -m data_jobs.training.canary --model M` answers some images of the evaluation again, by the served
code; only when they come out as they are in `predictions.parquet` is the answer to the drawing kept, as
`canary.npz`. The model stays the model that it is.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import pyarrow.parquet as pq

from data_jobs.sample_lesion import draw_lesion
from data_jobs.training.dataset import isic_folder, read_pixels, read_rows
from data_jobs.training.evaluation.predictions import PREDICTIONS_NAME
from deployments.classifier.classifier import Classifier, ClassifierOutput
from deployments.embedder.embedder import EmbeddingSpace
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from model_store.canary import PROBABILITY_OFF, Canary, write_canary
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import Diagnosis

#: How many images of the evaluation are answered again.
_AGAIN = 16
_DRAWINGS = range(1, 9)


def make_canary(model: StoredModel, classifier: Classifier, archive: Path) -> Canary:
    """Make a model's canary from the drawing that it is least sure of.

    An answer near 1 would hide what changes. Raises ValueError when the evaluation comes out otherwise.
    """
    _require_as_evaluated(model, classifier, archive)
    geometry = InputGeometry.from_manifest(model.manifest.input)
    drawings = [_draw(seed, geometry) for seed in _DRAWINGS]
    answers = [_answer(classifier, model, pixels) for pixels in drawings]
    best = min(range(len(answers)), key=lambda i: _certainty(model, answers[i]))
    answer = answers[best]
    vectors = {
        spec.embedding_space: EmbeddingSpace.from_model(model, spec).embed(answer.bottleneck[None])[0]
        for spec in model.manifest.spaces
    }
    return Canary.of_answer(drawings[best], answer.classification, answer.bottleneck, vectors)


def _require_as_evaluated(model: StoredModel, classifier: Classifier, archive: Path) -> None:
    table = pq.read_table(model.path(PREDICTIONS_NAME))
    table = table.take(np.linspace(0, table.num_rows - 1, min(_AGAIN, table.num_rows)).astype(int))
    rows = {row.isic_id: row for row in read_rows(archive)}
    geometry = InputGeometry.from_manifest(model.manifest.input)
    for recorded in table.to_pylist():
        pixels = read_pixels(rows[recorded["isic_id"]], archive, geometry)
        found = _answer(classifier, model, pixels).classification.probabilities
        off = max(abs(found[d] - recorded[d.value]) for d in Diagnosis)
        if not off <= PROBABILITY_OFF:
            raise ValueError(
                f"{recorded['isic_id']} is answered otherwise than it was evaluated: {off:.4f} off."
            )


def _draw(seed: int, geometry: InputGeometry) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    draw_lesion(size=(2 * geometry.side, 2 * geometry.side), seed=seed).save(buffer, "PNG")
    return prepare_image(buffer.getvalue(), geometry, UploadLimits(min_side=geometry.side)).pixels


def _answer(classifier: Classifier, model: StoredModel, pixels: NDArray[np.uint8]) -> ClassifierOutput:
    return classifier.classify(model.manifest.model_id, [pixels])[0]


def _certainty(model: StoredModel, answer: ClassifierOutput) -> float:
    """The greatest of the nine probabilities; infinite where the set hangs on a rounding."""
    nine = answer.classification.probabilities
    known = max(1.0 - nine[Diagnosis.UNK], 1e-9)
    thresholds = model.manifest.conformal.thresholds
    clear = all(
        abs(nine[d] / known / t - 1.0) > 10 * PROBABILITY_OFF for d, t in thresholds.items() if t > 0.0
    )
    return max(nine.values()) if clear else np.inf


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    store = ModelStore(arguments.models)
    model = store.open(arguments.model)
    canary = make_canary(model, Classifier(store, threads=arguments.threads), isic_folder())
    write_canary(model, canary)
    told = ", ".join(f"{d.value} {p:.4f}" for d, p in zip(Diagnosis, canary.nine, strict=True))
    print(f"{arguments.model}: {told}")


if __name__ == "__main__":
    main()

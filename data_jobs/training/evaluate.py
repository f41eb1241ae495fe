"""What a model folder is worth, on a fold that it was neither trained on nor fitted to.

`python -m data_jobs.training.evaluate --model M --recipe R` runs the served code (session, calibrator, embedding
space) over the test fold and, for the record, the calibration fold. It writes `predictions.parquet` (the test fold),
`calibration.parquet` (the calibration fold), `evaluation.json`, three pictures and `MODEL_CARD.md` into the model
folder and seals it. Nothing is fitted or chosen here.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_jobs.training.card import write_card
from data_jobs.training.dataset import fold_indices, isic_folder, load_pixels, read_rows
from data_jobs.training.embedding_spaces import retrieval_figures
from data_jobs.training.evaluation.figures import (
    RESAMPLES,
    accuracy_figures,
    bootstrap_intervals,
    challenge_figures,
    diagnosis_figures,
    lesion_figures,
    melanoma_curve,
    reliability,
    set_figures,
    subgroup_figures,
)
from data_jobs.training.evaluation.plots import draw_all
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    PREDICTIONS_NAME,
    Predictions,
    served,
    write_predictions,
)
from data_jobs.training.manifest_file import seal
from data_jobs.training.operating_points import lesion_scores, measure_threshold
from data_jobs.training.probabilities import rounded
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import scan_images, scan_pixels, soften
from data_jobs.training.unknown import SPOILT, unknown_figures
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.pixels import InputGeometry
from model_store.manifest import Manifest
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession


def evaluate(
    model: StoredModel, recipe: Recipe, threads: int
) -> tuple[dict[str, Any], Predictions, Predictions]:
    """All figures of the test fold; the predictions of the test fold and of the calibration fold."""
    archive = isic_folder()
    rows = read_rows(archive)
    test, fitted = (fold_indices(rows, [fold]) for fold in (recipe.data.test_fold, recipe.data.fitted_fold))
    geometry = InputGeometry.from_manifest(model.manifest.input)
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    pixels = load_pixels(rows, test, archive, geometry)
    scan = scan_pixels(session.run, pixels)
    predictions = Predictions([rows[i] for i in test], *served(calibrator, scan))
    softened, _ = served(calibrator, scan_pixels(session.run, soften(pixels)))
    other = scan_images(session.run, rows, fitted, archive, geometry)
    inside = calibrator.sets(predictions.eight, predictions.eight[:, None])
    lesions = pixels[:: max(1, len(pixels) // SPOILT)]
    calibrated = json.loads(model.path("calibration.json").read_text())
    report = {
        "model_id": model.manifest.model_id,
        "fold": recipe.data.test_fold,
        # Reports of earlier versions could be: whoever reads both needs to know.
        "cross_fitted": False,
        **figures_of(predictions, recipe.seed),
        "operating_points": point_figures(predictions, model.manifest),
        "sets": set_figures(predictions, inside, calibrator.coverage, calibrated["images_a_class"]),
        **unknown_figures(session.run, calibrator, predictions, lesions, geometry, recipe.seed),
        "retrieval": retrieval_figures(model, scan, predictions, recipe.seed),
        "softened": {
            "top1_agreement": rounded((softened.argmax(1) == predictions.nine.argmax(1)).mean()),
            **accuracy_figures(softened, predictions.labels),
        },
    }
    return report, predictions, Predictions([rows[i] for i in fitted], *served(calibrator, other))


def figures_of(predictions: Predictions, seed: int, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The figures that need nothing but predictions: anyone can compute them again from the file."""
    nine, labels = predictions.nine, predictions.labels
    ham = predictions[predictions.of_ham10000]
    return {
        "with_unk": accuracy_figures(nine, labels),
        "without_unk": accuracy_figures(predictions.eight, labels),
        "ham10000": accuracy_figures(ham.nine, ham.labels),
        **lesion_figures(predictions),
        "intervals": bootstrap_intervals(predictions, seed, resamples),
        "ham10000_intervals": bootstrap_intervals(ham, seed, resamples),
        **diagnosis_figures(predictions),
        "melanoma_curve": melanoma_curve(predictions),
        "reliability": reliability(predictions),
        "challenge": challenge_figures(predictions),
        "subgroups": subgroup_figures(predictions),
    }


def point_figures(predictions: Predictions, manifest: Manifest) -> dict[str, Any]:
    """What the manifest's thresholds give on these lesions."""
    known = predictions.eight, predictions.labels, predictions.lesions
    return {
        name: asdict(measure_threshold(*lesion_scores(*known, point.diagnoses), point.threshold))
        for name, point in manifest.operating_points.items()
    }


def without_nan(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """The same JSON with null for figures that a group too small does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def write_evidence(folder: Path, report: dict[str, Any], test: Predictions, calibration: Predictions) -> None:
    """Predictions, figures, pictures and card; the manifest then vouches for each."""
    write_predictions(folder / PREDICTIONS_NAME, test)
    write_predictions(folder / CALIBRATION_NAME, calibration)
    text = json.dumps(without_nan(report), indent=1, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n")
    draw_all(folder, report)
    write_card(folder)
    seal(folder)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    report, *predictions = evaluate(model, read_recipe(arguments.recipe), arguments.threads)
    write_evidence(model.folder, report, *predictions)
    summary = ("model_id", "with_unk", "by_lesion", "ham10000", "operating_points", "unk_share", "softened")
    print(json.dumps(without_nan({key: report[key] for key in summary}), indent=1))


if __name__ == "__main__":
    main()

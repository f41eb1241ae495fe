"""What a model folder is worth, on a fold that it was neither trained on nor fitted to.

`python -m data_jobs.training.evaluate --model M --recipe R` runs the served code (session,
calibrator, embedding space) over the test fold and, for the record, the calibration fold. It
writes `predictions.parquet` (the test fold, as judged), `calibration.parquet` (the calibration
fold, as served), `evaluation.json`, three pictures and `MODEL_CARD.md` into the model folder and
seals it. Where both folds are one, the test figures are cross-fitted (`cross_fitting`). Nothing
is fitted or chosen here.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_jobs.training.card import write_card
from data_jobs.training.conformal import set_figures
from data_jobs.training.cross_fitting import PARTS, CrossFit, Judged, judge, read_cross_fit
from data_jobs.training.dataset import fold_indices, isic_folder, load_pixels, read_rows
from data_jobs.training.embedding_spaces import retrieval_figures
from data_jobs.training.evaluation.figures import (
    accuracy_figures,
    challenge_figures,
    diagnosis_figures,
    lesion_diagnosis_figures,
    lesion_figures,
    melanoma_curve,
    reliability,
    subgroup_figures,
)
from data_jobs.training.evaluation.intervals import bootstrap_intervals
from data_jobs.training.evaluation.plots import draw_all
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    PREDICTIONS_NAME,
    Predictions,
    served,
    write_predictions,
)
from data_jobs.training.manifest_file import seal
from data_jobs.training.operating_points import by_lesion, measure_threshold, point_score
from data_jobs.training.outliers import SPOILT, unknown_figures
from data_jobs.training.probabilities import Floats
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import scan_images, scan_pixels, soften
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.pixels import InputGeometry
from model_store.manifest import Manifest
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.diagnosis import TRAINED


def evaluate(
    model: StoredModel, recipe: Recipe, threads: int, stride: int = 1
) -> tuple[dict[str, Any], Predictions, Predictions]:
    """All figures of the test fold; the predictions of the test fold as judged, of the calibration fold as served.

    `stride` takes every so many images only, to try things out.
    """
    archive = isic_folder()
    rows = read_rows(archive)
    test, calibration = (
        fold_indices(rows, [fold])[::stride] for fold in (recipe.data.test_fold, recipe.data.calibration_fold)
    )
    geometry = InputGeometry.from_manifest(model.manifest.input)
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    pixels = load_pixels(rows, test, archive, geometry)
    scan = scan_pixels(session.run, pixels)
    test_rows, manifest, cross = [rows[i] for i in test], model.manifest, read_cross_fit(model.folder)
    judged = judge(test_rows, scan, calibrator, manifest, cross)
    predictions = judged.predictions
    other = scan if cross else scan_images(session.run, rows, calibration, archive, geometry)
    softened = judge(test_rows, scan_pixels(session.run, soften(pixels)), calibrator, manifest, cross)
    lesions = pixels[:: max(1, len(pixels) // SPOILT)]
    report = {
        "model_id": model.manifest.model_id,
        "fold": recipe.data.test_fold,
        "cross_fitted": cross is not None,
        **figures_of(predictions, recipe.seed),
        "operating_points": point_figures(judged, manifest),
        "sets": set_figures(predictions, judged.thresholds, calibrator.coverage, fitted_images(model, cross)),
        **unknown_figures(session.run, calibrator, predictions, lesions, geometry, recipe.seed),
        "retrieval": retrieval_figures(model, scan, predictions, recipe.seed),
        "softened": softened_figures(predictions, softened.predictions.nine),
    }
    return report, predictions, Predictions([rows[i] for i in calibration], *served(calibrator, other))


def figures_of(predictions: Predictions, seed: int) -> dict[str, Any]:
    """The figures that need nothing but predictions: anyone can compute them again from the file."""
    nine, labels = predictions.nine, predictions.labels
    ham = predictions[predictions.of_ham10000]
    return {
        "with_unk": accuracy_figures(nine, labels),
        "without_unk": accuracy_figures(predictions.eight, labels),
        "ham10000": accuracy_figures(ham.nine, ham.labels),
        "by_lesion": lesion_figures(predictions),
        "diagnosis_by_lesion": lesion_diagnosis_figures(predictions),
        "intervals": bootstrap_intervals(predictions, seed),
        "ham10000_intervals": bootstrap_intervals(ham, seed),
        **diagnosis_figures(predictions),
        "melanoma_curve": melanoma_curve(predictions),
        "reliability": reliability(predictions),
        "challenge": challenge_figures(predictions),
        "subgroups": subgroup_figures(predictions),
    }


def fitted_images(model: StoredModel, cross: CrossFit | None) -> dict[str, int]:
    """How many images of every diagnosis a set threshold rests on; without a part, so many less."""
    images: dict[str, int] = json.loads(model.path("calibration.json").read_text())["images_a_class"]
    return {name: n * (PARTS - 1) // PARTS for name, n in images.items()} if cross else images


def point_figures(judged: Judged, manifest: Manifest) -> dict[str, Any]:
    """What the thresholds give on these lesions, each lesion by its own; `threshold` is the manifest's."""
    points, predictions = {}, judged.predictions
    for name, point in manifest.operating_points.items():
        positive = np.isin(predictions.labels, [TRAINED.index(d) for d in point.diagnoses])
        over = point_score(predictions.eight, point.diagnoses) - judged.points[name]
        found = measure_threshold(*by_lesion(over, positive, predictions.lesions), 0.0)
        points[name] = asdict(found) | {"threshold": point.threshold}
    return points


def softened_figures(predictions: Predictions, softened: Floats) -> dict[str, float]:
    """What a light blur changes."""
    same = softened.argmax(1) == predictions.nine.argmax(1)
    return {"top1_agreement": round(float(same.mean()), 4), **accuracy_figures(softened, predictions.labels)}


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
    parser.add_argument(
        "--stride", type=int, default=1, help="every so many images; above 1 nothing is written"
    )
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    report, *predictions = evaluate(model, read_recipe(arguments.recipe), arguments.threads, arguments.stride)
    if arguments.stride == 1:
        write_evidence(model.folder, report, *predictions)
    summary = ("model_id", "with_unk", "by_lesion", "ham10000", "operating_points", "unk_share", "softened")
    print(json.dumps(without_nan({key: report[key] for key in summary}), indent=1))


if __name__ == "__main__":
    main()

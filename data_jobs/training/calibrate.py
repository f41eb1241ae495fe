"""From an export to a loadable model folder.

`python -m data_jobs.training.calibrate --recipe R --export E --models model_store/models`

Everything is fitted on the training folds (class statistics, embedding space) and the calibration fold (temperature,
conformal thresholds, p(UNK), operating points). The test fold is not read. `references.parquet` is left empty:
`data_jobs.references.bundle` fills it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
from pathlib import Path
import shutil

import numpy as np

from data_jobs.promotion.acceptance import write_acceptance
from data_jobs.references.bundle import write_references
from data_jobs.training.dataset import (
    fold_indices,
    isic_folder,
    labels_of,
    load_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.embedding_spaces import choose_space, pair_figures
from data_jobs.training.evaluation.figures import by_diagnosis
from data_jobs.training.manifest_file import COVERAGE, manifest_content, write_manifest
from data_jobs.training.operating_points import choose_points, conformal_thresholds
from data_jobs.training.outliers import make_outliers, skin_like
from data_jobs.training.probabilities import calibration_error, fit_temperature, quantiles, rounded, softmax
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import Pixels, open_onnx, scan_images, scan_pixels, soften
from data_jobs.training.unknown import (
    SPOILT,
    fit_logistic,
    fit_statistics,
    outlier_figures,
)
from deployments.classifier.calibration import unknown_probability
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import measure_quality
from serve_app.domain.diagnosis import TRAINED

QUALITY_QUANTILES = (0.0, 0.001, 0.005, 0.01, 0.05, 0.5, 0.95, 0.99, 0.995, 0.999, 1.0)
SCORE_QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99, 0.995, 0.999)


def quality_quantiles(pixels: Pixels) -> dict[str, dict[str, float]]:
    """Quantiles of every measure of quality over N prepared images: what a policy's limits are set from.

    "sharpness when blurred": of images of no use any more, blurred by a Gaussian of 1/64 of the side.
    """
    measured = [asdict(measure_quality(image)) for image in pixels]
    blurred = [measure_quality(image).sharpness for image in soften(pixels[::4], pixels.shape[1] / 64)]
    values = {name: [m[name] for m in measured] for name in measured[0]}
    values["sharpness when blurred"] = blurred
    return {name: quantiles(found, QUALITY_QUANTILES, 5) for name, found in values.items()}


def calibrate(recipe: Recipe, export: Path, models: Path) -> Path:
    """Fit everything, write the model folder, and return it."""
    exported = json.loads((export / "export.json").read_text())
    geometry = InputGeometry(exported["side"], recipe.data.interpolation)
    archive = isic_folder()
    rows = read_rows(archive)
    train_indices = training_indices(rows, recipe.data)
    held_indices = fold_indices(rows, [recipe.data.fitted_fold])
    train_rows, held_rows = [rows[i] for i in train_indices], [rows[i] for i in held_indices]
    pixels = load_pixels(rows, held_indices, archive, geometry)
    run = open_onnx(export / "model.onnx")
    train = scan_images(run, rows, train_indices, archive, geometry)
    held = scan_pixels(run, pixels)
    softened = scan_pixels(run, soften(pixels[::4]))
    labels = labels_of(held_rows)

    temperature = round(fit_temperature(held.logits, labels), 4)
    p = softmax(held.logits, temperature)
    lesions = [row.lesion for row in held_rows]
    points = choose_points(p, labels, lesions)
    thresholds = np.floor(conformal_thresholds(p, labels, COVERAGE) * 1e6) / 1e6
    drawn = make_outliers(geometry, recipe.seed, archive)
    outliers = drawn + skin_like(pixels[:: len(pixels) // SPOILT], recipe.seed)
    fitting = np.array([outlier.part == "fit" for outlier in outliers])
    found = scan_pixels(run, np.stack([outlier.pixels for outlier in outliers])).bottleneck
    statistics = fit_statistics(train.bottleneck, labels_of(train_rows), found[fitting])
    known, scores = statistics.score(held.bottleneck), statistics.score(found)
    slope, intercept = fit_logistic(known, scores[fitting])
    space_name, space, space_figures = choose_space(train, train_rows, held, held_rows)
    fitted = {"temperature": temperature, "slope": round(slope, 6), "intercept": round(intercept, 6)}
    fitted["training_images"] = len(train_indices)
    report = fitted | {
        "calibration_images": len(held_indices),
        "ece": rounded(calibration_error(p, labels)),
        "images_a_class": by_diagnosis(np.bincount(labels, minlength=len(TRAINED)), int),
        "thresholds": by_diagnosis(thresholds, float),
        "operating_points": {name: asdict(point) for name, point in points.items()},
        "known_scores": quantiles(known, SCORE_QUANTILES),
        "known_p_unk": quantiles(unknown_probability(known, slope, intercept), SCORE_QUANTILES),
        "outlier_scores": quantiles(scores[: len(drawn)], SCORE_QUANTILES),
        "outliers": outlier_figures(known, drawn, scores[: len(drawn)], slope, intercept),
        "skin_like": outlier_figures(known, outliers[len(drawn) :], scores[len(drawn) :], slope, intercept),
        "quality": quality_quantiles(pixels),
        "spaces": space_figures,
        "pairs": pair_figures(space.embed(held.bottleneck), lesions),
        "softened_images": len(softened.logits),
        "softened_top1_agreement": rounded((softened.logits.argmax(1) == held.logits[::4].argmax(1)).mean()),
        "top1": rounded((held.logits.argmax(1) == labels).mean()),
    }
    content = manifest_content(recipe, exported["side"], fitted, points, thresholds, space_name)
    folder = models / recipe.model_id
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(export / "model.onnx", folder / "model.onnx")
    shutil.copyfile(export / "export.json", folder / "export.json")
    np.savez(folder / "ood.npz", means=statistics.means, precision=statistics.precision)
    np.savez(folder / content["spaces"][0]["transform"], mean=space.mean, matrix=space.matrix)
    (folder / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    if recipe.acceptance is not None:
        write_acceptance(folder, recipe.acceptance)
    write_references(folder / "references.parquet", [], np.empty((0, 512), np.float32))
    write_manifest(folder, content)
    return folder


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    arguments = parser.parse_args()
    folder = calibrate(read_recipe(arguments.recipe), arguments.export, arguments.models)
    print((folder / "calibration.json").read_text())


if __name__ == "__main__":
    main()

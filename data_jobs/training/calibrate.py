"""From an export to a loadable model folder.

`python -m data_jobs.training.calibrate --recipe R --export E --models model_store/models`

Everything is fitted on the training folds (class statistics, embedding space) and the
calibration fold (temperature, conformal thresholds, p(UNK), operating points). The test fold
is not read, unless it is the calibration fold: then it is fitted without each part in turn as
well, for `evaluate`. `references.parquet` is left empty: `data_jobs.references.bundle` fills it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
import json
from pathlib import Path
import shutil

import numpy as np

from data_jobs.promotion.acceptance import write_acceptance
from data_jobs.references.bundle import write_references
from data_jobs.training.conformal import conformal_thresholds
from data_jobs.training.cross_fitting import cross_fit, write_cross_fit
from data_jobs.training.dataset import (
    LabelledImage,
    fold_indices,
    isic_folder,
    labels_of,
    load_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.embedding_spaces import (
    LinearSpace,
    balanced_precision_at,
    candidate_spaces,
    nearest,
    precision_at,
)
from data_jobs.training.manifest_file import COVERAGE, manifest_content, write_manifest
from data_jobs.training.operating_points import choose_points
from data_jobs.training.outliers import Outlier, make_outliers, outlier_figures, skin_like
from data_jobs.training.probabilities import Floats, Labels, calibration_error, fit_temperature, softmax
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import Pixels, Scan, open_onnx, scan_images, scan_pixels, soften
from data_jobs.training.unknown import (
    ClassStatistics,
    distance_score,
    fit_logistic,
    fit_statistics,
    unknown_probability,
)
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import measure_quality
from serve_app.domain.diagnosis import TRAINED

QUALITY_QUANTILES = (0.0, 0.001, 0.005, 0.01, 0.05, 0.5, 0.95, 0.99, 0.995, 0.999, 1.0)
SCORE_QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99, 0.995, 0.999)


def choose_space(
    train: Scan, train_rows: list[LabelledImage], held: Scan, held_rows: list[LabelledImage]
) -> tuple[LinearSpace, dict[str, dict[str, float]]]:
    """The space of best precision@10 (mean of plain and balanced), and the figures of all."""
    train_labels, held_labels = labels_of(train_rows), labels_of(held_rows)
    figures = {}
    spaces = {space.name: space for space in candidate_spaces(train.bottleneck, train_labels)}
    for name, space in spaces.items():
        found = nearest(
            space.embed(held.bottleneck),
            [row.lesion for row in held_rows],
            space.embed(train.bottleneck),
            [row.lesion for row in train_rows],
            10,
        )
        figures[name] = {
            "precision_at_10": round(precision_at(found, held_labels, train_labels), 4),
            "balanced_precision_at_10": round(balanced_precision_at(found, held_labels, train_labels), 4),
        }
    best = max(figures, key=lambda name: sum(figures[name].values()))
    return spaces[best], figures


@dataclass(frozen=True, slots=True)
class FittedUnknown:
    """How p(UNK) is computed, and the scores it was fitted on.

    `known` are the scores of the calibration fold, `scores` those of every outlier.
    """

    statistics: ClassStatistics
    slope: float
    intercept: float
    known: Floats
    scores: Floats


def fit_unknown(
    train: Scan, train_labels: Labels, held: Scan, outliers: list[Outlier], outlier_scan: Scan
) -> FittedUnknown:
    """Statistics from the training folds and the outliers of the `fit` part; the map from fold and outliers."""
    fitting = np.array([outlier.part == "fit" for outlier in outliers])
    statistics = fit_statistics(train.bottleneck, train_labels, outlier_scan.bottleneck[fitting])
    known = distance_score(held.bottleneck, statistics)
    scores = distance_score(outlier_scan.bottleneck, statistics)
    slope, intercept = fit_logistic(known, scores[fitting])
    return FittedUnknown(statistics, slope, intercept, known, scores)


def quantiles(values: Floats) -> dict[str, float]:
    """Quantiles of a score, rounded for reading."""
    return {str(q): round(float(np.quantile(values, q)), 4) for q in SCORE_QUANTILES}


def quality_quantiles(pixels: Pixels) -> dict[str, dict[str, float]]:
    """Quantiles of every measure of quality over N prepared images: what a policy's limits are set from.

    "sharpness when blurred": of images of no use any more, blurred by a Gaussian of 1/64 of the side.
    """
    measured = [asdict(measure_quality(image)) for image in pixels]
    blurred = [measure_quality(image).sharpness for image in soften(pixels[::4], pixels.shape[1] / 64)]
    values = {name: [m[name] for m in measured] for name in measured[0]}
    return {
        name: {str(q): round(float(np.quantile(found, q)), 5) for q in QUALITY_QUANTILES}
        for name, found in {**values, "sharpness when blurred": blurred}.items()
    }


def calibrate(recipe: Recipe, export: Path, models: Path) -> Path:
    """Fit everything, write the model folder, and return it."""
    exported = json.loads((export / "export.json").read_text())
    geometry = InputGeometry(exported["side"], recipe.data.interpolation)
    archive = isic_folder()
    rows = read_rows(archive)
    train_indices = training_indices(rows, recipe.data)
    held_indices = fold_indices(rows, [recipe.data.calibration_fold])
    train_rows, held_rows = [rows[i] for i in train_indices], [rows[i] for i in held_indices]
    pixels = load_pixels(rows, held_indices, archive, geometry)
    run = open_onnx(export / "model.onnx")
    train = scan_images(run, rows, train_indices, archive, geometry)
    held = scan_pixels(run, pixels)
    softened = scan_pixels(run, soften(pixels[::4]))
    labels = labels_of(held_rows)

    temperature = round(fit_temperature(held.logits, labels), 4)
    p = softmax(held.logits, temperature)
    points = choose_points(p, labels, [row.lesion for row in held_rows])
    thresholds = np.floor(conformal_thresholds(p, labels, COVERAGE) * 1e6) / 1e6
    drawn = make_outliers(geometry, recipe.seed)
    outliers = drawn + skin_like(pixels[:: len(pixels) // 100], recipe.seed)
    outlier_scan = scan_pixels(run, np.stack([outlier.pixels for outlier in outliers]))
    unknown = fit_unknown(train, labels_of(train_rows), held, outliers, outlier_scan)
    known, scores = unknown.known, unknown.scores
    slope, intercept = unknown.slope, unknown.intercept
    space, space_figures = choose_space(train, train_rows, held, held_rows)
    fitted = {
        "temperature": temperature,
        "slope": round(slope, 6),
        "intercept": round(intercept, 6),
        "training_images": len(train_indices),
    }
    report = fitted | {
        "calibration_images": len(held_indices),
        "ece": round(calibration_error(p, labels), 4),
        "images_a_class": {d.value: int((labels == i).sum()) for i, d in enumerate(TRAINED)},
        "thresholds": {d.value: float(t) for d, t in zip(TRAINED, thresholds, strict=True)},
        "operating_points": {name: asdict(point) for name, point in points.items()},
        "known_scores": quantiles(known),
        "known_p_unk": quantiles(unknown_probability(known, slope, intercept)),
        "outlier_scores": quantiles(scores[: len(drawn)]),
        "outliers": outlier_figures(known, drawn, scores[: len(drawn)], slope, intercept),
        "skin_like": outlier_figures(known, outliers[len(drawn) :], scores[len(drawn) :], slope, intercept),
        "quality": quality_quantiles(pixels),
        "spaces": space_figures,
        "softened_images": len(softened.logits),
        "softened_top1_agreement": round(
            float((softened.logits.argmax(1) == held.logits[::4].argmax(1)).mean()), 4
        ),
        "top1": round(float((held.logits.argmax(1) == labels).mean()), 4),
    }
    content = manifest_content(recipe, exported["side"], fitted, points, thresholds, space)
    folder = models / recipe.model_id
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(export / "model.onnx", folder / "model.onnx")
    shutil.copyfile(export / "export.json", folder / "export.json")
    np.savez(folder / "ood.npz", means=unknown.statistics.means, precision=unknown.statistics.precision)
    np.savez(folder / content["spaces"][0]["transform"], mean=space.mean, matrix=space.matrix)
    if recipe.data.test_fold == recipe.data.calibration_fold:
        fit = cross_fit(
            held.logits,
            known,
            labels,
            [row.lesion for row in held_rows],
            shift=exported["prior_shift"],
            prior=np.bincount(labels_of(train_rows), minlength=len(TRAINED)) / len(train_rows),
            outlier_scores=scores[np.array([outlier.part == "fit" for outlier in outliers])],
            coverage=COVERAGE,
        )
        write_cross_fit(folder, fit)
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

"""From an export to a loadable model folder.

`python -m data_jobs.training.calibrate --recipe R --export E --models model_store/models`; R is a recipe or an
ensemble.

Everything is fitted on the training folds (class statistics, embedding space) and on folds that a network left out
(temperature, prediction sets, p(UNK), operating points). The test fold is not read. `references.parquet` is left
empty: `data_jobs.references.bundle` fills it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
import json
from pathlib import Path
import shutil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.promotion.acceptance import write_acceptance
from data_jobs.references.bundle import write_references
from data_jobs.training.dataset import isic_folder, labels_of, load_pixels, read_rows, training_indices
from data_jobs.training.embedding_spaces import choose_space, pair_figures
from data_jobs.training.ensemble import Ensemble, read_ensemble
from data_jobs.training.evaluation.figures import by_diagnosis
from data_jobs.training.manifest_file import COVERAGE, manifest_content, write_manifest
from data_jobs.training.operating_points import (
    OUT_OF_FOLD_SENSITIVITY,
    POINTS,
    choose_points,
    conformal_thresholds,
    count_below,
    lesion_scores,
    measure_threshold,
)
from data_jobs.training.outliers import make_outliers, skin_like
from data_jobs.training.probabilities import (
    Labels,
    area_under_curve,
    calibration_error,
    fit_temperature,
    quantiles,
    rounded,
    softmax,
)
from data_jobs.training.scan import Pixels, open_onnx, scan_images, scan_pixels, soften
from data_jobs.training.unknown import SPOILT, fit_logistic, fit_statistics, outlier_figures
from deployments.classifier.calibration import member_disagreement, unknown_probability
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import measure_quality
from model_store.session import Outputs
from serve_app.domain.diagnosis import TRAINED

QUALITY_QUANTILES = (0.0, 0.001, 0.005, 0.01, 0.05, 0.5, 0.95, 0.99, 0.995, 0.999, 1.0)
#: Of the melanoma point: from where a policy may take a melanoma below it for plausible.
PLAUSIBLE_FRACTIONS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
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


def first_images(lesions: Sequence[str]) -> NDArray[np.bool_]:
    """Which of N images are the first of their lesion."""
    picked = np.zeros(len(lesions), dtype=np.bool_)
    picked[np.unique(lesions, return_index=True)[1]] = True
    return picked


def doubt_figures(
    held: Outputs, labels: Labels, temperature: float, member_temperature: float
) -> dict[str, Any]:
    """How well two measures find wrong first answers of the mean (AUROC): a small margin, and members that disagree."""
    if held.members is None:
        return {}
    p = softmax(held.logits, temperature)
    wrong, ranked = p.argmax(1) != labels, np.sort(p, axis=1)
    apart = member_disagreement(softmax(held.members, member_temperature))
    return {
        "margin_auroc": rounded(area_under_curve(ranked[:, -2] - ranked[:, -1], wrong)),
        "disagreement_auroc": rounded(area_under_curve(apart, wrong)),
        "disagreement": quantiles(apart, SCORE_QUANTILES),
        "disagreement_where_wrong": quantiles(apart[wrong], SCORE_QUANTILES),
    }


def calibrate(ensemble: Ensemble, export: Path, models: Path) -> Path:
    """Fit everything, write the model folder, and return it.

    Temperature of the members, operating points and prediction sets come from the answers to every left-out fold by the
    member that left it out; what concerns the mean (its own temperature, p(UNK), the embedding space) from the images
    that no member has seen. Of one network both are its calibration fold.
    """
    exported = json.loads((export / "export.json").read_text())
    plan = ensemble.members[0].data
    geometry = InputGeometry(exported["side"], plan.interpolation)
    archive = isic_folder()
    rows = read_rows(archive)
    run = open_onnx(export / "model.onnx")
    asked, unseen_indices = np.flatnonzero(ensemble.member_of(rows) >= 0), ensemble.unseen(rows)
    left_rows, held_rows = [rows[i] for i in asked], [rows[i] for i in unseen_indices]
    seen_indices = sorted({int(i) for m in ensemble.members for i in training_indices(rows, m.data)})
    # What all members together left out is most of what they were trained on.
    scanned = np.union1d(asked, seen_indices)
    answers = scan_images(run, rows, scanned, archive, geometry)
    in_folds = answers.part(np.isin(scanned, asked))
    held = in_folds.part(np.isin(asked, unseen_indices))
    pixels = load_pixels(rows, unseen_indices, archive, geometry)
    softened = scan_pixels(run, soften(pixels[::4]))
    labels, held_labels = labels_of(left_rows), labels_of(held_rows)
    train_rows = [rows[i] for i in seen_indices]
    train = answers.part(np.isin(scanned, seen_indices))

    of_member = ensemble.member_of(left_rows)
    logits = (
        in_folds.logits
        if in_folds.members is None
        else in_folds.members[np.arange(len(of_member)), of_member]
    )
    member_temperature = round(fit_temperature(logits, labels), 4)
    temperature = (
        member_temperature
        if in_folds.members is None
        else round(fit_temperature(held.logits, held_labels), 4)
    )
    p = softmax(logits, member_temperature)
    lesions = [row.lesion for row in left_rows]
    alone = len(ensemble.members) == 1
    points = choose_points(p, labels, lesions, least=0.0 if alone else OUT_OF_FOLD_SENSITIVITY)
    # The mean is compared with what single members gave: it is surer of the truth than they, so that it is covered.
    told = np.ones(len(labels), dtype=np.bool_) if alone else first_images(lesions)
    thresholds = conformal_thresholds(p[told], labels[told], COVERAGE, together=not alone)
    thresholds = np.floor(thresholds * 1e6) / 1e6
    drawn = make_outliers(geometry, ensemble.seed, archive)
    outliers = drawn + skin_like(pixels[:: max(1, len(pixels) // SPOILT)], ensemble.seed)
    fitting = np.array([outlier.part == "fit" for outlier in outliers])
    found = scan_pixels(run, np.stack([outlier.pixels for outlier in outliers]))
    arrays: dict[str, Mapping[str, NDArray[np.float32]]] = {}
    if held.unknown is not None and found.unknown is not None:
        # The graph scores, and its export fitted the line.
        known, distances = held.unknown.astype(np.float64), found.unknown.astype(np.float64)
        slope, intercept = exported["unknown"]["slope"], exported["unknown"]["intercept"]
    else:
        statistics = fit_statistics(train.bottleneck, labels_of(train_rows), found.bottleneck[fitting])
        arrays["ood.npz"] = {"means": statistics.means, "precision": statistics.precision}
        known, distances = statistics.score(held.bottleneck), statistics.score(found.bottleneck)
        slope, intercept = fit_logistic(known, distances[fitting])
    space_name, space, space_figures = choose_space(train, train_rows, held, held_rows)
    of_mean = softmax(held.logits, temperature)
    fitted = {
        "temperature": temperature,
        "member_temperature": member_temperature,
        "slope": round(slope, 6),
        "intercept": round(intercept, 6),
        "graph_scores_unknown": held.unknown is not None,
        "training_images": len(seen_indices),
    }
    report = fitted | {
        "calibration_images": len(left_rows),
        "unseen_images": len(held_rows),
        "ece": rounded(calibration_error(p, labels)),
        "ece_of_mean": rounded(calibration_error(of_mean, held_labels)),
        "images_a_class": by_diagnosis(np.bincount(labels, minlength=len(TRAINED)), int),
        "thresholds": by_diagnosis(thresholds, float),
        "operating_points": {name: asdict(point) for name, point in points.items()},
        "operating_points_of_mean": {
            name: asdict(
                measure_threshold(
                    *lesion_scores(of_mean, held_labels, [row.lesion for row in held_rows], POINTS[name]),
                    point.threshold,
                )
            )
            for name, point in points.items()
        },
        "plausible": count_below(
            *lesion_scores(p, labels, lesions, POINTS["melanoma"]),
            points["melanoma"].threshold,
            PLAUSIBLE_FRACTIONS,
        ),
        "known_scores": quantiles(known, SCORE_QUANTILES),
        "known_p_unk": quantiles(unknown_probability(known, slope, intercept), SCORE_QUANTILES),
        "outlier_scores": quantiles(distances[: len(drawn)], SCORE_QUANTILES),
        "outliers": outlier_figures(known, drawn, distances[: len(drawn)], slope, intercept),
        "skin_like": outlier_figures(
            known, outliers[len(drawn) :], distances[len(drawn) :], slope, intercept
        ),
        "quality": quality_quantiles(pixels),
        "spaces": space_figures,
        "pairs": pair_figures(space.embed(held.bottleneck), [row.lesion for row in held_rows]),
        "softened_images": len(softened.logits),
        "softened_top1_agreement": rounded((softened.logits.argmax(1) == held.logits[::4].argmax(1)).mean()),
        "top1": rounded((logits.argmax(1) == labels).mean()),
        "doubt": doubt_figures(held, held_labels, temperature, member_temperature),
    }
    content = manifest_content(ensemble, exported["side"], fitted, points, thresholds, space_name)
    arrays[content["spaces"][0]["transform"]] = {"mean": space.mean, "matrix": space.matrix}
    return _write_folder(models / ensemble.model_id, ensemble, export, arrays, report, content)


def _write_folder(
    folder: Path,
    ensemble: Ensemble,
    export: Path,
    arrays: Mapping[str, Mapping[str, NDArray[np.float32]]],
    report: Mapping[str, Any],
    content: Mapping[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.onnx", "export.json"):
        shutil.copyfile(export / name, folder / name)
    for name, parts in arrays.items():
        np.savez(folder / name, **parts)  # type: ignore[arg-type]
    (folder / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    if ensemble.acceptance is not None:
        write_acceptance(folder, ensemble.acceptance)
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
    folder = calibrate(read_ensemble(arguments.recipe), arguments.export, arguments.models)
    print((folder / "calibration.json").read_text())


if __name__ == "__main__":
    main()

"""Which score tells what is no lesion: Mahalanobis, ViM, kNN and others on the shipped model's features.

`python -m data_jobs.training.unknown_methods --model M --recipe R` measures all of them with
training images, images of the calibration fold and outliers, writes `unknown_methods.json` into
the model folder and seals it; the card tells it when it is written next. The test fold is not
read: this is where the score was chosen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from data_jobs.training.dataset import (
    fold_indices,
    isic_folder,
    labels_of,
    load_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.evaluation.predictions import served
from data_jobs.training.manifest_file import seal
from data_jobs.training.outliers import make_outliers, skin_like
from data_jobs.training.probabilities import Floats, softmax
from data_jobs.training.ranking import area_under_curve
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import Scan, scan_images, scan_pixels
from data_jobs.training.unknown import distance_score, fit_statistics, outlier_direction
from data_jobs.training.unknown_scores import (
    log_sum_exp,
    mahalanobis,
    neighbour_distance,
    virtual_logit,
)
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.resize import InputGeometry
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession

NEIGHBOURS = 50
#: Every so many images of the training folds and of the calibration fold.
STRIDE = 4
SPOILT = 100


def compare_methods(model: StoredModel, recipe: Recipe, threads: int, stride: int = STRIDE) -> dict[str, Any]:
    """AUROC of every score for every kind of outlier of the test part, against the calibration fold."""
    archive = isic_folder()
    rows = read_rows(archive)
    trained = training_indices(rows, recipe.data)[::stride]
    held = fold_indices(rows, [recipe.data.calibration_fold])
    geometry = InputGeometry.from_manifest(model.manifest.input)
    run = InferenceSession(model, threads=threads).run
    train = scan_images(run, rows, trained, archive, geometry)
    known = scan_images(run, rows, held[::stride], archive, geometry)
    lesions = load_pixels(rows, held[:: max(1, len(held) // SPOILT)], archive, geometry)
    outliers = make_outliers(geometry, recipe.seed) + skin_like(lesions, recipe.seed)
    other = scan_pixels(run, np.stack([outlier.pixels for outlier in outliers]))
    fitting = np.array([outlier.part == "fit" for outlier in outliers])
    kinds = np.array([outlier.kind for outlier in outliers])

    calibrator = Calibrator.from_model(model)
    labels = labels_of([rows[i] for i in trained])
    direction = outlier_direction(train.bottleneck, labels, other.bottleneck[fitting])

    def scores(scan: Scan) -> dict[str, Floats]:
        return {
            "highest probability": -softmax(scan.logits, calibrator.temperature).max(1),
            "energy": -log_sum_exp(scan.logits),
            "Mahalanobis": mahalanobis(train.bottleneck, labels, scan.bottleneck),
            f"kNN, k = {NEIGHBOURS}": neighbour_distance(train.bottleneck, scan.bottleneck, NEIGHBOURS),
            "ViM": virtual_logit(train, scan),
            "direction (fitted to outliers)": scan.bottleneck.astype(np.float64) @ direction,
            "as shipped (Mahalanobis and direction)": served(calibrator, scan)[1],
        }

    near, far = scores(known), scores(other)
    tested = sorted(set(kinds[~fitting]))
    auroc = {
        method: {
            kind: round(_auroc(near[method], far[method][~fitting & (kinds == kind)]), 4) for kind in tested
        }
        | {"all": round(_auroc(near[method], far[method][~fitting]), 4)}
        for method in near
    }
    unseen = {}
    for kind in tested:
        statistics = fit_statistics(train.bottleneck, labels, other.bottleneck[fitting & (kinds != kind)])
        far_off = distance_score(other.bottleneck[~fitting & (kinds == kind)], statistics)
        unseen[kind] = round(_auroc(distance_score(known.bottleneck, statistics), far_off), 4)
    counts = {kind: int((~fitting & (kinds == kind)).sum()) for kind in tested}
    # Every kind has a score of its own: of all, the mean by images, which one score's AUROC would be, too.
    everything = sum(unseen[kind] * count for kind, count in counts.items()) / sum(counts.values())
    auroc["as shipped, but that kind left out of the fit"] = unseen | {"all": round(everything, 4)}
    return {
        "model_id": model.manifest.model_id,
        "training_images": len(trained),
        "known_images": len(known.logits),
        "outliers": counts,
        "auroc": auroc,
    }


def _auroc(known: Floats, unknown: Floats) -> float:
    return area_under_curve(
        np.concatenate([known, unknown]), np.arange(len(known) + len(unknown)) >= len(known)
    )


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stride", type=int, default=STRIDE, help="every so many images")
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    recipe = read_recipe(arguments.recipe)
    text = json.dumps(compare_methods(model, recipe, arguments.threads, arguments.stride), indent=1)
    (model.folder / "unknown_methods.json").write_text(text + "\n")
    seal(model.folder)
    print(text)


if __name__ == "__main__":
    main()

"""What a model folder is worth, on the fold nothing was ever chosen on.

`python -m data_jobs.training.evaluate --model M --recipe R` runs the served code (session,
calibrator, embedding space) over the test fold, writes `evaluation.json` and `MODEL_CARD.md`
into the model folder and seals it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pyarrow.parquet as pq

from data_jobs.references.bundle import geometry_of
from data_jobs.training.calibrate import outlier_figures, soften
from data_jobs.training.card import write_card
from data_jobs.training.conformal import class_coverage, prediction_sets
from data_jobs.training.dataset import LabelledImage, fold_indices, isic_folder, labels_of, read_rows
from data_jobs.training.embedding_spaces import balanced_precision_at, nearest, precision_at
from data_jobs.training.manifest_file import seal
from data_jobs.training.operating_points import by_lesion, measure_threshold, point_score
from data_jobs.training.outliers import make_outliers
from data_jobs.training.probabilities import Floats, Labels, calibration_error, log_loss
from data_jobs.training.ranking import (
    area_under_curve,
    balanced_accuracy,
    class_recall,
    top_k_accuracy,
)
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.scan import Scan, scan_images, scan_pixels
from deployments.classifier.calibration import Calibrator
from deployments.embedder.embedder import EmbeddingSpace
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.diagnosis import TRAINED, Diagnosis

MELANOMA = TRAINED.index(Diagnosis.MEL)
RESAMPLES = 500


def accuracy_figures(nine: Floats, labels: Labels) -> dict[str, float]:
    """Figures of N×9 (or N×8) probabilities; a top answer of UNK is wrong."""
    return {
        "images": len(labels),
        "top1": round(top_k_accuracy(nine, labels, 1), 4),
        "top3": round(top_k_accuracy(nine, labels, 3), 4),
        "balanced_accuracy": round(balanced_accuracy(nine, labels, len(TRAINED)), 4),
        "melanoma_auc": round(area_under_curve(nine[:, MELANOMA], labels == MELANOMA), 4),
        "ece": round(calibration_error(nine, labels), 4),
        "log_loss": round(log_loss(nine, labels), 4),
    }


def lesion_intervals(
    nine: Floats, labels: Labels, rows: list[LabelledImage], seed: int
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals (percentile), resampling lesions and not images."""
    rng = np.random.default_rng(seed)
    lesions: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        lesions.setdefault(row.lesion, []).append(i)
    groups = [np.array(group) for group in lesions.values()]
    drawn: dict[str, list[float]] = {"top1": [], "top3": [], "balanced_accuracy": [], "melanoma_auc": []}
    for _ in range(RESAMPLES):
        picked = np.concatenate([groups[g] for g in rng.integers(0, len(groups), len(groups))])
        figures = accuracy_figures(nine[picked], labels[picked])
        for name, values in drawn.items():
            values.append(figures[name])
    return {
        name: (round(float(np.quantile(v, 0.025)), 4), round(float(np.quantile(v, 0.975)), 4))
        for name, v in drawn.items()
    }


def subgroup_figures(nine: Floats, labels: Labels, rows: list[LabelledImage]) -> dict[str, dict[str, float]]:
    """Accuracy by source, aspect, resolution, sex, age and body site; groups under 30 images are left out."""
    groups: dict[str, NDArray[np.bool_]] = {}

    def add(name: str, values: list[str]) -> None:
        for value in sorted(set(values)):
            groups[f"{name}: {value}"] = np.array([v == value for v in values])

    add("source", ["HAM10000" if (r.lesion_id or "").startswith("HAM_") else "other" for r in rows])
    add("aspect", [r.aspect for r in rows])
    add("short side", ["under 224" if min(r.width, r.height) < 224 else "224 or more" for r in rows])
    add("sex", [r.sex or "unknown" for r in rows])
    add("age", ["unknown" if r.age_approx is None else _age_band(r.age_approx) for r in rows])
    add("site", [r.anatom_site_general or "unknown" for r in rows])
    return {
        name: accuracy_figures(nine[picked], labels[picked])
        for name, picked in groups.items()
        if picked.sum() >= 30
    }


def _age_band(age: int) -> str:
    return "under 40" if age < 40 else "40 to 59" if age < 60 else "60 or more"


def retrieval_figures(
    model: StoredModel, scan: Scan, rows: list[LabelledImage], labels: Labels
) -> dict[str, float]:
    """Precision@10 and the melanoma AUC of a 16-neighbour vote, against the shipped references."""
    live = model.manifest.live_space
    table = pq.read_table(model.path(live.references))
    halves = table["embedding"].combine_chunks().flatten().to_numpy()
    references = halves.astype(np.float32).reshape(table.num_rows, -1)
    names = [d.value for d in TRAINED]
    reference_labels = np.array([names.index(d) for d in table["diagnosis"].to_pylist()])
    lesions = [
        lesion or isic_id
        for lesion, isic_id in zip(table["lesion_id"].to_pylist(), table["isic_id"].to_pylist(), strict=True)
    ]
    queries = EmbeddingSpace.from_model(model, live).embed(scan.bottleneck)
    found = nearest(queries, [row.lesion for row in rows], references, lesions, 16)
    vote = (reference_labels[found] == MELANOMA).mean(1)
    return {
        "references": table.num_rows,
        "precision_at_10": round(precision_at(found[:, :10], labels, reference_labels), 4),
        "balanced_precision_at_10": round(balanced_precision_at(found[:, :10], labels, reference_labels), 4),
        "vote_16_melanoma_auc": round(area_under_curve(vote, labels == MELANOMA), 4),
    }


def set_figures(eight: Floats, thresholds: Floats, labels: Labels) -> dict[str, Any]:
    """Coverage of every class and the sizes of the prediction sets."""
    sets = prediction_sets(eight, thresholds)
    size = sets.sum(1)
    return {
        "coverage": round(float(sets[np.arange(len(labels)), labels].mean()), 4),
        "coverage_by_class": {
            d.value: round(float(c), 4) for d, c in zip(TRAINED, class_coverage(sets, labels), strict=True)
        },
        "mean_size": round(float(size.mean()), 3),
        "share_of_one": round(float((size == 1).mean()), 4),
        "share_empty": round(float((size == 0).mean()), 4),
    }


def evaluate(model: StoredModel, recipe: Recipe, threads: int) -> dict[str, Any]:
    """All figures of the test fold."""
    archive = isic_folder()
    rows = read_rows(archive)
    indices = fold_indices(rows, [recipe.data.test_fold])
    rows_held = [rows[i] for i in indices]
    labels = labels_of(rows_held)
    geometry = geometry_of(model.manifest.input)
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    scan = scan_images(session.run, rows, indices, archive, geometry)
    soft = scan_images(session.run, rows, indices, archive, geometry, change=soften)
    nine, scores = served(calibrator, scan)
    eight = nine[:, :8] / nine[:, :8].sum(1, keepdims=True)
    softened, _ = served(calibrator, soft)
    ham = np.array([(row.lesion_id or "").startswith("HAM_") for row in rows_held])
    outliers = make_outliers(geometry, recipe.seed)
    outlier_scan = scan_pixels(session.run, np.stack([o.pixels for o in outliers]))
    _, outlier_scores = served(calibrator, outlier_scan)
    points = {}
    for name, point in model.manifest.operating_points.items():
        positive = np.isin(labels, [TRAINED.index(d) for d in point.diagnoses])
        lesions = [row.lesion for row in rows_held]
        by = by_lesion(point_score(eight, point.diagnoses), positive, lesions)
        points[name] = asdict(measure_threshold(*by, point.threshold))
    confusion = np.zeros((8, 9), int)
    np.add.at(confusion, (labels, nine.argmax(1)), 1)
    ood = model.manifest.ood
    return {
        "model_id": model.manifest.model_id,
        "fold": recipe.data.test_fold,
        "with_unk": accuracy_figures(nine, labels),
        "without_unk": accuracy_figures(eight, labels),
        "ham10000": accuracy_figures(nine[ham], labels[ham]),
        "intervals": lesion_intervals(nine, labels, rows_held, recipe.seed),
        "recall": {
            d.value: round(float(r), 4) for d, r in zip(TRAINED, class_recall(nine, labels, 8), strict=True)
        },
        "images_a_class": {d.value: int((labels == i).sum()) for i, d in enumerate(TRAINED)},
        "auc": {d.value: round(area_under_curve(eight[:, i], labels == i), 4) for i, d in enumerate(TRAINED)},
        "confusion": {d.value: confusion[i].tolist() for i, d in enumerate(TRAINED)},
        "operating_points": points,
        "sets": set_figures(eight, calibrator.thresholds, labels),
        "unk_share": round(float((nine.argmax(1) == 8).mean()), 4),
        "median_p_unk": round(float(np.median(nine[:, 8])), 6),
        "outliers": outlier_figures(scores, outliers, outlier_scores, ood.slope, ood.intercept),
        "retrieval": retrieval_figures(model, scan, rows_held, labels),
        "softened": {
            "top1_agreement": round(float((softened.argmax(1) == nine.argmax(1)).mean()), 4),
            **accuracy_figures(softened, labels),
        },
        "subgroups": subgroup_figures(nine, labels, rows_held),
    }


def served(calibrator: Calibrator, scan: Scan) -> tuple[Floats, Floats]:
    """N×9 probabilities in the order of Diagnosis, and out-of-distribution scores, as served."""
    answers = []
    for start in range(0, len(scan.logits), 256):
        part = slice(start, start + 256)
        answers += calibrator.classify(scan.logits[part], scan.bottleneck[part])
    nine = np.array([[a.probabilities[d] for d in Diagnosis] for a in answers])
    return nine, np.array([a.ood_score for a in answers])


def without_nan(value: Any) -> Any:  # noqa: ANN401 - JSON is any
    """The same JSON with null for figures that a group too small does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    report = evaluate(model, read_recipe(arguments.recipe), arguments.threads)
    text = json.dumps(without_nan(report), indent=1, allow_nan=False)
    (model.folder / "evaluation.json").write_text(text + "\n")
    write_card(model.folder)
    seal(model.folder)
    print(text)


if __name__ == "__main__":
    main()

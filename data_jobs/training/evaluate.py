"""What a model folder is worth, on a fold that it was neither trained on nor fitted to.

`python -m data_jobs.training.evaluate --model M --recipe R` runs the served code, from an image's bytes to outcome and
risk level under the current policy, over the test fold of both sources, over the photographs that are no dermoscopy,
and over the fold's images turned, softened and cluttered; for the record over the calibration fold, too. It writes
`predictions.parquet` (the test fold), `calibration.parquet` (the calibration fold), `evaluation.json`, three pictures
and `MODEL_CARD.md` into the model folder and seals it. Nothing is fitted or chosen here.

`--onnx M.onnx --recipe R --side S` scores a bare graph instead, a classifier alone, source by source, and writes
nothing. What `train` writes after every epoch becomes a graph by `export --weights`; its logits need
`--prior-shift 0.5`, say, which an export of a checkpoint has in it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
import json
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np

from data_jobs.training.card import write_card
from data_jobs.training.dataset import (
    BCN84,
    CLINICAL,
    LabelledImage,
    fold_indices,
    isic_folder,
    labels_of,
    read_bcn84,
    read_clinical,
    read_rows,
    training_indices,
)
from data_jobs.training.embedding_spaces import retrieval_figures
from data_jobs.training.ensemble import Ensemble, read_ensemble
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
    source_figures,
    subgroup_figures,
)
from data_jobs.training.evaluation.outcomes import LocalService, outcome_figures
from data_jobs.training.evaluation.plots import draw_all
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    PREDICTIONS_NAME,
    Predictions,
    known_eight,
    served,
    write_predictions,
)
from data_jobs.training.evaluation.robustness import clutter_figures, view_figures
from data_jobs.training.manifest_file import seal
from data_jobs.training.operating_points import lesion_scores, measure_threshold
from data_jobs.training.probabilities import rounded, softmax
from data_jobs.training.scan import Pixels, open_onnx, scan_images
from data_jobs.training.unknown import SPOILT, unknown_figures
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.pixels import InputGeometry
from deployments.risk.policy import read_policy
from model_store.manifest import Manifest
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession, Outputs
from serve_app.domain.diagnosis import TRAINED


def evaluate(
    model: StoredModel, ensemble: Ensemble, threads: int
) -> tuple[dict[str, Any], Predictions, Predictions]:
    """All figures of the test fold; the predictions of the test fold and of the calibration fold."""
    archive = isic_folder()
    rows = read_rows(archive)
    tested = [row for row in rows if row.fold == ensemble.members[0].data.test_fold]
    fitted = np.flatnonzero(ensemble.member_of(rows) >= 0)
    policy = read_policy()
    service = LocalService(model, policy, threads=threads)
    images = service.prepare(tested, archive)
    answers = service.answer(tested, images)
    predictions = answers.predictions(tested)
    lesions = np.stack([image.pixels for image in images[:: max(1, len(images) // SPOILT)]])
    calibrated = json.loads(model.path("calibration.json").read_text())
    others = {
        BCN84: [row for row in _bcn84(archive) if row.fold == ensemble.members[0].data.test_fold],
        CLINICAL: [row for row in read_clinical(archive) if row.fold == 0],
    }
    found = {
        name: service.answer(part, service.prepare(part, archive)) for name, part in others.items() if part
    }
    nine = np.concatenate([predictions.nine, *(found[name].nine for name in found if name == BCN84)])
    report = {
        "model_id": model.manifest.model_id,
        "fold": ensemble.members[0].data.test_fold,
        # Reports of earlier versions could be: whoever reads both needs to know.
        "cross_fitted": False,
        **figures_of(predictions, ensemble.seed),
        "operating_points": point_figures(predictions, model.manifest),
        "sets": set_figures(
            predictions, answers.sets, service.calibrator.coverage, calibrated["images_a_class"]
        ),
        **unknown_figures(
            service.run, service.calibrator, predictions, lesions, service.geometry, ensemble.seed
        ),
        "retrieval": retrieval_figures(model, answers.scan, predictions, ensemble.seed),
        "sources": source_figures(known_eight(nine), [*tested, *(others[BCN84] if BCN84 in found else [])]),
        "outcomes": {
            "archive": outcome_figures(tested, answers, policy),
            **{name: outcome_figures(others[name], part, policy) for name, part in found.items()},
        },
        "views": view_figures(service, tested, images, answers),
        "clutter": clutter_figures(service, tested, images, answers, ensemble.seed),
        "milliseconds": milliseconds(model, lesions),
    }
    other = scan_images(service.run, rows, fitted, archive, service.geometry)
    return report, predictions, out_of_fold(ensemble, [rows[i] for i in fitted], service.calibrator, other)


def out_of_fold(
    ensemble: Ensemble, rows: list[LabelledImage], calibrator: Calibrator, scan: Outputs
) -> Predictions:
    """Predictions of N rows of the folds left out, each by the member that left it out: what calibration saw."""
    if scan.members is not None:
        own = scan.members[np.arange(len(rows)), ensemble.member_of(rows)]
        scan = scan._replace(logits=own)
        calibrator = replace(calibrator, temperature=calibrator.member_temperature)
    return Predictions(rows, *served(calibrator, scan))


def _bcn84(archive: Path) -> list[LabelledImage]:
    return read_bcn84(archive) if (archive / BCN84).is_dir() else []


def milliseconds(model: StoredModel, pixels: Pixels) -> float:
    """Median of one image's forward pass on one core: processor time, so that what else runs here does not count."""
    run, taken = InferenceSession(model, threads=1).run, []
    for image in pixels[:30]:
        started = process_time()
        run(image[None])
        taken.append(1e3 * (process_time() - started))
    return rounded(np.median(taken), 1)


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


def score_graph(path: Path, ensemble: Ensemble, arguments: argparse.Namespace) -> dict[str, Any]:
    """`source_figures` of a graph's logits over one fold of both sources, prepared as the service would."""
    archive = isic_folder()
    rows = read_rows(archive)
    plan = ensemble.members[0].data
    counts = np.bincount(labels_of(rows)[training_indices(rows, plan)], minlength=len(TRAINED))
    rows += _bcn84(archive)
    picked = fold_indices(rows, [arguments.fold])[:: arguments.stride]
    geometry = InputGeometry(arguments.side, plan.interpolation)
    scan = scan_images(open_onnx(path, arguments.threads), rows, picked, archive, geometry)
    logits = scan.logits + arguments.prior_shift * np.log(counts / counts.sum())
    return source_figures(softmax(logits), [rows[i] for i in picked])


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    scored = parser.add_mutually_exclusive_group(required=True)
    scored.add_argument("--model")
    scored.add_argument(
        "--onnx", type=Path, help="a bare graph instead; the options below --threads are its own"
    )
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", type=int)
    parser.add_argument(
        "--prior-shift", type=float, default=0.0, help="share of log prior given back to logits"
    )
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1, help="every so many images only, to try things out")
    arguments = parser.parse_args()
    ensemble = read_ensemble(arguments.recipe)
    if arguments.onnx:
        if arguments.side is None:
            parser.error("--onnx needs --side")
        print(json.dumps(without_nan(score_graph(arguments.onnx, ensemble, arguments)), indent=1))
        return
    model = ModelStore(arguments.models).open(arguments.model)
    report, *predictions = evaluate(model, ensemble, arguments.threads)
    write_evidence(model.folder, report, *predictions)
    summary = (
        *("model_id", "with_unk", "by_lesion", "ham10000", "operating_points", "unk_share", "sources"),
        *("outcomes", "views", "clutter", "retrieval", "milliseconds"),
    )
    print(json.dumps(without_nan({key: report[key] for key in summary}), indent=1))


if __name__ == "__main__":
    main()

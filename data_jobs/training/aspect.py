"""Does it matter whether an image arrives in its own shape or squashed? Measured, for one model.

`python -m data_jobs.training.aspect --model M` scores the archive's files of true aspect by the
served code as they are and squashed beforehand, writes `aspect.json` into the model folder and
seals it; the card tells it when it is written next. Two thirds of the archive arrived squashed
and which ones goes with the diagnosis; a camera sends 4:3.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import os
from pathlib import Path
import tomllib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_jobs.references.catalogue import ARCHIVE_LIMITS
from data_jobs.training.dataset import LabelledImage, isic_folder, read_rows
from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions, served
from data_jobs.training.manifest_file import write_manifest
from data_jobs.training.reshape import WAYS, reshaped
from data_jobs.training.scan import Scan
from deployments.classifier.calibration import Calibrator
from deployments.preprocess.preprocess import prepare_image
from deployments.preprocess.resize import InputGeometry
from model_store.manifest import MANIFEST_NAME
from model_store.registry import ModelStore, StoredModel
from model_store.session import InferenceSession
from serve_app.domain.diagnosis import Diagnosis

ASPECT_NAME = "aspect.json"
#: Scored for every file; the other ways for the test fold alone.
EVERYWHERE = "squashed"
CHANGE_QUANTILES = (0.5, 0.95, 0.99, 1.0)


def prove_aspect(model: StoredModel, test_fold: int, threads: int, stride: int = 1) -> dict[str, Any]:
    """Agreement of every way with the file's own shape, and accuracy of each; `stride` to try things out."""
    archive = isic_folder()
    rows = [row for row in read_rows(archive) if row.aspect == "true"][::stride]
    held = np.array([row.fold == test_fold for row in rows])
    session = InferenceSession(model, threads=threads)
    calibrator = Calibrator.from_model(model)
    geometry = InputGeometry.from_manifest(model.manifest.input)

    def score(picked: list[LabelledImage], way: str | None) -> Predictions:
        return Predictions(picked, *served(calibrator, scan_way(session, picked, archive, geometry, way)))

    own, squashed = score(rows, None), score(rows, EVERYWHERE)
    threshold = model.manifest.operating_points["melanoma"].threshold
    tested = own[held]
    others = {way: score(tested.rows, way) for way in WAYS if way != EVERYWHERE}
    return {
        "model_id": model.manifest.model_id,
        "decision": model.manifest.input.aspect,
        "images": len(rows),
        "test_fold": test_fold,
        "agreement": {
            f"{EVERYWHERE}, all files": agreement(own, squashed, threshold),
            f"{EVERYWHERE}, fold {test_fold}": agreement(tested, squashed[held], threshold),
            **{f"{way}, fold {test_fold}": agreement(tested, p, threshold) for way, p in others.items()},
        },
        "accuracy": {
            "all files (most were trained on)": {
                "own shape": accuracy_figures(own.nine, own.labels),
                EVERYWHERE: accuracy_figures(squashed.nine, squashed.labels),
            },
            f"fold {test_fold}": {
                way: accuracy_figures(p.nine, p.labels)
                for way, p in {"own shape": tested, EVERYWHERE: squashed[held], **others}.items()
            },
        },
    }


def agreement(before: Predictions, after: Predictions, threshold: float) -> dict[str, Any]:
    """How far the answers to the same images lie apart.

    `mean_change` is the mean |Δp| over images and the nine classes, `melanoma_change` quantiles of
    |Δp(MEL)|, `drift` the mean signed change of each class: a model that reads the shape itself
    would drift towards the diagnoses that the archive holds squashed (AK, SCC, VASC).
    `same_side_of_melanoma_point` is the share of images that stay on their side of the threshold.
    """
    labels = before.labels
    change = after.nine - before.nine
    first, second = before.nine.argmax(1), after.nine.argmax(1)
    melanoma = np.abs(change[:, MELANOMA])
    sides = [p.eight[:, MELANOMA] >= threshold for p in (before, after)]
    return {
        "images": len(labels),
        "top1_agreement": round(float((first == second).mean()), 4),
        "right_to_wrong": int(((first == labels) & (second != labels)).sum()),
        "wrong_to_right": int(((first != labels) & (second == labels)).sum()),
        "mean_change": round(float(np.abs(change).mean()), 5),
        "melanoma_change": {str(q): round(float(np.quantile(melanoma, q)), 5) for q in CHANGE_QUANTILES},
        "same_side_of_melanoma_point": round(float((sides[0] == sides[1]).mean()), 4),
        "drift": {d.value: round(float(mean), 5) for d, mean in zip(Diagnosis, change.mean(0), strict=True)},
    }


def scan_way(
    session: InferenceSession,
    rows: list[LabelledImage],
    archive: Path,
    geometry: InputGeometry,
    way: str | None,
    batch: int = 32,
) -> Scan:
    """Logits and bottlenecks of the files, reshaped first unless `way` is None."""

    def pixels(row: LabelledImage) -> NDArray[np.uint8]:
        data = (archive / "images" / f"{row.isic_id}.jpg").read_bytes()
        return prepare_image(data if way is None else reshaped(data, way), geometry, ARCHIVE_LIMITS).pixels

    parts = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(rows), batch):
            prepared = list(pool.map(pixels, rows[start : start + batch]))
            parts.append(session.run(np.stack(prepared)))
    return Scan(np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))


def name_evidence(folder: Path) -> None:
    """Write into the manifest, beside the decision, which file it rests on, and seal the folder."""
    with (folder / MANIFEST_NAME).open("rb") as file:
        content = tomllib.load(file)
    content.pop("files")
    content["input"]["aspect_evidence"] = ASPECT_NAME
    write_manifest(folder, content)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--test-fold", type=int, default=0, help="the fold that the model never saw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--stride", type=int, default=1, help="every so many files; above 1 nothing is written"
    )
    arguments = parser.parse_args()
    model = ModelStore(arguments.models).open(arguments.model)
    proof = prove_aspect(model, arguments.test_fold, arguments.threads, arguments.stride)
    text = json.dumps(proof, indent=1, allow_nan=False)
    if arguments.stride == 1:
        (model.folder / ASPECT_NAME).write_text(text + "\n")
        name_evidence(model.folder)
    print(text)


if __name__ == "__main__":
    main()

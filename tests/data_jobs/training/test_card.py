from __future__ import annotations

import json
from pathlib import Path
import shutil
from typing import Any

import numpy as np
import pytest

from data_jobs.training.evaluation.predictions import Predictions
from model_store.manifest import MANIFEST_NAME, read_manifest
from model_store.registry import verify_files

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(models: Path, model_id: str, tmp_path: Path) -> Path:
    """A copy of the shipped model without what an evaluation writes."""
    copy = tmp_path / model_id
    shutil.copytree(models / model_id, copy)
    for name in ("evaluation.json", "MODEL_CARD.md", "aspect.json", "unknown_methods.json"):
        (copy / name).unlink(missing_ok=True)
    for picture in copy.glob("*.png"):
        picture.unlink()
    manifest = copy / MANIFEST_NAME
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if not line.startswith("aspect_evidence")))
    return copy


@pytest.fixture(scope="module")
def figures(predictions: Predictions) -> dict[str, Any]:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    from data_jobs.training.evaluate import figures_of

    return figures_of(predictions, seed=1)


@pytest.fixture
def report(folder: Path, predictions: Predictions, figures: dict[str, Any]) -> dict[str, Any]:
    """Every figure that predictions give; the rest, which needs images, as another job measured it."""
    from data_jobs.training.evaluate import point_figures, set_figures

    manifest = read_manifest(folder)
    calibrated = json.loads((folder / "calibration.json").read_text())
    return {
        "model_id": folder.name,
        "fold": 0,
        **figures,
        "operating_points": point_figures(predictions, manifest),
        "sets": set_figures(predictions, np.full(8, 0.1), 0.95, calibrated["images_a_class"]),
        "unk_share": 0.01,
        "median_p_unk": 0.0001,
        "outliers": calibrated["outliers"],
        "skin_like": calibrated["skin_like"],
        "retrieval": {
            "references": 4000,
            "precision_at_10": 0.7,
            "balanced_precision_at_10": 0.5,
            "vote_16_melanoma_auc": 0.8,
            "softmax_melanoma_auc": 0.9,
            "vote_minus_softmax": -0.1,
            "vote_minus_softmax_interval": (-0.12, -0.08),
        },
        "softened": {"top1_agreement": 0.9, "top1": 0.7},
    }


def test_evidence_is_written_and_vouched_for(
    folder: Path, predictions: Predictions, report: dict[str, Any]
) -> None:
    from data_jobs.training.evaluate import write_evidence

    half = np.arange(len(predictions)) < 800
    write_evidence(folder, report, predictions[half], predictions[~half])
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    pictures = {"confusion.png", "reliability.png", "melanoma.png"}
    written = {"predictions.parquet", "calibration.parquet", "evaluation.json", "MODEL_CARD.md"}
    assert pictures | written <= set(manifest.files)
    assert all(manifest.files[name].bytes < 150_000 for name in pictures)
    card = (folder / "MODEL_CARD.md").read_text()
    assert all(f"]({name})" in card for name in pictures)
    assert f"{report['with_unk']['top1']:.4f}" in card
    told = " ".join(card.split())
    assert "16-neighbour vote 0.8000, the softmax (without UNK) 0.9000; the vote's minus" in told
    assert "is -0.1000, 95 % interval -0.1200 to -0.0800 (paired" in told
    assert "None" not in card
    assert " nan " not in card
    digests = dict(manifest.files)
    write_evidence(folder, report, predictions[half], predictions[~half])
    assert read_manifest(folder).files == digests

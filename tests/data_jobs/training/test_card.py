from __future__ import annotations

from collections.abc import Callable
import json
from pathlib import Path
import shutil

import numpy as np
import pytest

from data_jobs.training.evaluation.figures import source_figures
from data_jobs.training.evaluation.outcomes import Answers, outcome_figures
from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.evaluation.robustness import SOFTENED
from deployments.risk.policy import read_policy
from model_store.manifest import MANIFEST_NAME, read_manifest
from model_store.registry import verify_files

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(models: Path, model_id: str, tmp_path: Path) -> Path:
    """A copy of the shipped model without what an evaluation writes."""
    copy = tmp_path / model_id
    shutil.copytree(models / model_id, copy)
    for name in ("MODEL_CARD.md", "aspect.json", "unknown_methods.json"):
        (copy / name).unlink(missing_ok=True)
    for picture in copy.glob("*.png"):
        picture.unlink()
    manifest = copy / MANIFEST_NAME
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if not line.startswith("aspect_evidence")))
    return copy


def test_evidence_is_written_and_vouched_for(
    folder: Path, predictions: Predictions, make_answers: Callable[..., Answers]
) -> None:
    pytest.importorskip("matplotlib", reason="needs the train extra")
    from data_jobs.training.evaluate import write_evidence

    report = json.loads((folder / "evaluation.json").read_text())
    report["retrieval"] |= {
        "vote_16_melanoma_auc": 0.8,
        "softmax_melanoma_auc": 0.9,
        "vote_minus_softmax": -0.1,
        "vote_minus_softmax_interval": (-0.12, -0.08),
    }
    report["auc"]["DF"] = float("nan")
    told = make_answers(("decided", "high"), ("review", "low"), reasons=["low_margin"])
    changes = {"top1_changes": 0.051, "level_changes": 0.012}
    kind = {"lost": 3, "lost_or_doubted": 4, "more_high": 0.07, "review_or_refused": 0.1}
    report |= {
        "sources": source_figures(predictions.eight, predictions.rows),
        "outcomes": {"archive": outcome_figures(predictions.rows[1:3], told, read_policy())},
        "views": {
            "images": 500,
            "views": {SOFTENED: changes},
            "turned_or_mirrored": changes,
            "any_of_four": changes,
        },
        "clutter": {
            "melanomas": 100,
            "melanomas_high": 96,
            "naevi": 100,
            "naevi_high": 50,
            "kinds": {"ink": kind},
        },
        "milliseconds": 8.1,
    }
    half = np.arange(len(predictions)) < 800
    write_evidence(folder, report, predictions[half], predictions[~half])
    manifest = read_manifest(folder)
    verify_files(folder, manifest.files)
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
    assert "5.1% / 1.2%; 5.1% |" in told
    assert "| ink | 3 | 4 | +7% | 10% |" in told
    assert "of all images (one may have several): low_margin 50.0%." in told
    assert "None" not in card
    assert " nan " not in card
    digests = dict(manifest.files)
    write_evidence(folder, report, predictions[half], predictions[~half])
    assert read_manifest(folder).files == digests

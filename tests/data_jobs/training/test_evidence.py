"""The evidence in a model folder, held against the predictions that lie beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.conformal import conformal_thresholds
from data_jobs.training.dataset import LabelledImage, read_rows
from data_jobs.training.evaluation.figures import (
    accuracy_figures,
    challenge_figures,
    diagnosis_figures,
    lesion_figures,
)
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    PREDICTIONS_NAME,
    Predictions,
    read_predictions,
)
from data_jobs.training.operating_points import choose_points
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import TRAINED


@pytest.fixture(scope="module")
def rows(isic_dir: Path) -> dict[str, LabelledImage]:
    return {row.isic_id: row for row in read_rows(isic_dir)}


@pytest.fixture(scope="module")
def evidence(models: Path, rows: dict[str, LabelledImage]) -> list[tuple[StoredModel, Predictions]]:
    store = ModelStore(models)
    found = [model for model in map(store.open, store) if PREDICTIONS_NAME in model.manifest.files]
    assert found, "no model ships its predictions: there is nothing to hold the figures against"
    return [(model, read_predictions(model.path(PREDICTIONS_NAME), rows)) for model in found]


def _fold(predictions: Predictions, fold: int) -> Predictions:
    return predictions[np.array([row.fold == fold for row in predictions.rows])]


def test_every_image_of_the_test_fold_has_an_answer(
    evidence: list[tuple[StoredModel, Predictions]], rows: dict[str, LabelledImage]
) -> None:
    for model, predictions in evidence:
        fold = json.loads(model.path("evaluation.json").read_text())["fold"]
        assert {row.isic_id for row in predictions.rows} >= {
            row.isic_id for row in rows.values() if row.fold == fold
        }
        assert np.allclose(predictions.nine.sum(1), 1.0, atol=1e-5)


def test_the_figures_follow_from_the_predictions(evidence: list[tuple[StoredModel, Predictions]]) -> None:
    for model, predictions in evidence:
        told = json.loads(model.path("evaluation.json").read_text())
        test = _fold(predictions, told["fold"])
        ham = test[test.of_ham10000]
        for name, found in {
            "with_unk": accuracy_figures(test.nine, test.labels),
            "without_unk": accuracy_figures(test.eight, test.labels),
            "ham10000": accuracy_figures(ham.nine, ham.labels),
            "by_lesion": lesion_figures(test),
        }.items():
            assert told[name] == pytest.approx(found, abs=5e-4), name
        assert told["confusion"] == diagnosis_figures(test)["confusion"]
        softmax = told["retrieval"]["softmax_melanoma_auc"]
        assert softmax == pytest.approx(accuracy_figures(test.eight, test.labels)["melanoma_auc"], abs=5e-4)
        seven = challenge_figures(test)["isic2018_seven_ham10000"]
        assert told["challenge"]["isic2018_seven_ham10000"]["mean_auc"] == pytest.approx(
            seven["mean_auc"], abs=5e-4
        )


def test_the_thresholds_follow_from_the_calibration_fold(
    evidence: list[tuple[StoredModel, Predictions]], rows: dict[str, LabelledImage]
) -> None:
    for model, _ in evidence:
        fitted = read_predictions(model.path(CALIBRATION_NAME), rows)
        points = choose_points(fitted.eight, fitted.labels, fitted.lesions)
        for name, point in model.manifest.operating_points.items():
            assert points[name].threshold == pytest.approx(point.threshold, abs=5e-6), name
            assert (points[name].positives, points[name].misses) == (point.positives, point.misses)
        thresholds = conformal_thresholds(fitted.eight, fitted.labels, model.manifest.conformal.coverage)
        told = [model.manifest.conformal.thresholds[d] for d in TRAINED]
        assert thresholds == pytest.approx(told, abs=5e-6)

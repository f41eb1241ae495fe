from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from data_jobs.training.evaluation.figures import accuracy_figures, diagnosis_figures
from data_jobs.training.evaluation.intervals import (
    bootstrap_intervals,
    interval,
    resampled_weights,
    weighted_auc,
    weighted_calibration_error,
)
from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.probabilities import area_under_curve, calibration_error


def test_images_of_a_lesion_are_drawn_together() -> None:
    weights = resampled_weights(["a", "b", "a", "c"], 200, seed=0)
    assert weights.shape == (200, 4)
    assert np.array_equal(weights[:, 0], weights[:, 2])
    assert np.array_equal(weights[:, 0] + weights[:, 1] + weights[:, 3], np.full(200, 3.0))
    assert len(np.unique(weights, axis=0)) > 1


def test_weights_count_as_copies(predictions: Predictions) -> None:
    weights = resampled_weights(predictions.lesions, 5, seed=2)
    copies = np.repeat(np.arange(len(predictions)), weights[3].astype(int))
    labels, nine = predictions.labels, predictions.nine
    tied = np.round(nine[:, 0], 2)
    assert weighted_auc(tied, labels == 0, weights)[3] == pytest.approx(
        area_under_curve(tied[copies], labels[copies] == 0), abs=1e-12
    )
    assert weighted_calibration_error(nine, labels, weights)[3] == pytest.approx(
        calibration_error(nine[copies], labels[copies]), abs=1e-12
    )


def test_intervals_hold_their_figures(predictions: Predictions) -> None:
    spans = bootstrap_intervals(predictions, seed=3)
    figures = accuracy_figures(predictions.nine, predictions.labels)
    classes = diagnosis_figures(predictions)
    for name in ("top1", "top3", "balanced_accuracy", "melanoma_auc"):
        low, high = spans[name]
        assert low <= figures[name] <= high
        assert 0.0 < high - low < 0.1
    for name in ("recall", "precision", "auc"):
        for diagnosis, (low, high) in spans[name].items():
            assert low <= classes[name][diagnosis] <= high


def test_intervals_cover_as_often_as_they_say(make_predictions: Callable[..., Predictions]) -> None:
    many = make_predictions(40000, seed=99)
    truth = accuracy_figures(many.nine, many.labels)["top1"]
    held = 0
    for seed in range(60):
        low, high = bootstrap_intervals(make_predictions(300, seed=seed), seed, resamples=200)["top1"]
        held += low <= truth <= high
    assert held >= 51  # fewer has a probability under 1 % for 60 intervals of 95 %


def test_no_value_no_interval() -> None:
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()
    assert interval(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)


@pytest.mark.torch
def test_weighted_auc_against_scikit_learn(predictions: Predictions) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the train extra")
    weights = resampled_weights(predictions.lesions, 4, seed=5)
    positive, scores = predictions.labels == 0, np.round(predictions.nine[:, 0], 2)
    for found, weight in zip(weighted_auc(scores, positive, weights), weights, strict=True):
        assert found == pytest.approx(
            metrics.roc_auc_score(positive, scores, sample_weight=weight), abs=1e-12
        )

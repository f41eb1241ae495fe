from __future__ import annotations

import numpy as np
import pytest

from data_jobs.training.conformal import conformal_thresholds, coverage_range, set_figures
from data_jobs.training.evaluation.figures import (
    READINGS,
    melanoma_curve,
    reliability_bins,
    sensitivity_specificity,
)
from data_jobs.training.evaluation.predictions import Predictions
from data_jobs.training.operating_points import measure_threshold
from data_jobs.training.probabilities import softmax
from serve_app.domain.diagnosis import TRAINED


def test_a_curve_by_hand() -> None:
    scores = np.array([0.9, 0.4, 0.4, 0.8, 0.1])
    positive = np.array([True, True, False, False, False])
    thresholds, sensitivity, specificity = sensitivity_specificity(scores, positive)
    assert thresholds.tolist() == [0.9, 0.4]
    assert sensitivity.tolist() == [0.5, 1.0]
    assert specificity == pytest.approx([1.0, 1 / 3])
    with pytest.raises(ValueError, match="positives and negatives"):
        sensitivity_specificity(scores, np.ones(5, dtype=bool))


def test_every_point_of_a_curve_is_what_its_threshold_gives() -> None:
    rng = np.random.default_rng(4)
    positive = rng.random(300) < 0.3
    scores = np.round(rng.random(300) * 0.7 + 0.3 * positive, 2)
    for threshold, sensitivity, specificity in zip(*sensitivity_specificity(scores, positive), strict=True):
        point = measure_threshold(scores, positive, float(threshold))
        assert sensitivity == pytest.approx(point.sensitivity)
        assert specificity == pytest.approx(point.specificity)


def test_readings_reach_the_sensitivity_asked_for(predictions: Predictions) -> None:
    curve = melanoma_curve(predictions)
    assert all(r["hits"] / r["positives"] >= s for r, s in zip(curve["readings"], READINGS, strict=True))
    specificities = [r["specificity"] for r in curve["readings"]]
    assert specificities == sorted(specificities, reverse=True)
    assert len(curve["threshold"]) == len(curve["sensitivity"]) == len(curve["specificity"])


def test_bins_hold_every_image() -> None:
    told = np.array([0.0, 0.5, 0.52, 1.0])
    bins = reliability_bins(told, np.array([False, True, False, True]), bins=10)
    assert [b["images"] for b in bins] == [1, 2, 1]
    assert bins[1] == {"images": 2, "told": 0.51, "found": 0.5}


def test_the_expected_coverage_is_the_one_of_many_splits() -> None:
    rng = np.random.default_rng(6)
    low, high = coverage_range(59, 40, 0.95)
    covered = []
    for _ in range(4000):
        scores = rng.random(99)
        threshold = np.sort(scores[:59])[2]  # k = floor(0.05 * 60) = 3, the third smallest
        covered.append(int((scores[59:] >= threshold).sum()))
    assert np.mean(np.array(covered) < low) <= 0.035
    assert np.mean(np.array(covered) > high) <= 0.035
    assert np.mean([low <= c <= high for c in covered]) == pytest.approx(0.96, abs=0.02)
    # Fewer than 19 images: the class is in every set.
    assert coverage_range(18, 40, 0.95) == (40, 40)


def test_sets_say_what_was_covered(predictions: Predictions) -> None:
    half = np.arange(len(predictions)) % 4 < 2
    fitted, tested = predictions[half], predictions[~half]
    thresholds = conformal_thresholds(fitted.eight, fitted.labels, 0.95)
    counts = {d.value: int((fitted.labels == i).sum()) for i, d in enumerate(TRAINED)}
    figures = set_figures(tested, thresholds, 0.95, counts)
    assert figures["coverage"] == pytest.approx(0.95, abs=0.03)
    for found in figures["classes"].values():
        assert found["within_range"] == (found["range"][0] <= found["covered"] <= found["range"][1])
    assert sum(found["within_range"] for found in figures["classes"].values()) >= 7
    everything = set_figures(tested, np.zeros(8), 0.95, counts)
    assert everything["mean_size"] == 8.0
    assert everything["coverage"] == 1.0


@pytest.mark.torch
def test_sets_against_crepes() -> None:
    """Class-conditional sets of an independent implementation, for counts where 0.05 (n + 1) is no integer.

    Where it is one, crepes keeps p = 0.05 and we do not: both keep the promise, ours is the smaller set.
    """
    crepes = pytest.importorskip("crepes", reason="needs the test extra")
    rng = np.random.default_rng(8)
    counts = (25, 61, 10, 240)
    labels = np.repeat(np.arange(4), counts)
    logits = rng.normal(size=(len(labels), 4)) + 1.5 * np.eye(4)[labels]
    told, new = softmax(logits), softmax(rng.normal(size=(500, 4)))

    class Learner:
        classes_ = np.arange(4)

        def predict_proba(self, probabilities):
            return probabilities

    def sets(calibrated: np.ndarray, *, class_cond: bool) -> np.ndarray:
        oracle = crepes.WrapClassifier(Learner())
        oracle.calibrate(told[calibrated], labels[calibrated], class_cond=class_cond)
        return oracle.predict_set(new, labels=False, confidence=0.95, smoothing=False).astype(bool)

    expected = sets(labels < 4, class_cond=True)
    # The three rare ones are in the sets of the rare together, too.
    expected[:, :3] |= sets(labels < 3, class_cond=False)[:, :3]
    found = new >= conformal_thresholds(told, labels, 0.95)
    assert np.array_equal(found, expected)

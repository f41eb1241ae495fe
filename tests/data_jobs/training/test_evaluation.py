"""Every figure that a model is judged by: counts, curves, sets, intervals, and the neighbours' vote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_jobs.training.calibrate import first_images
from data_jobs.training.dataset import BCN84, LabelledImage, read_rows
from data_jobs.training.embedding_spaces import VOTERS, vote_figures
from data_jobs.training.evaluation.figures import (
    accuracy_figures,
    bootstrap_intervals,
    challenge_figures,
    coverage_range,
    diagnosis_figures,
    lesion_predictions,
    resampled_weights,
    set_figures,
    source_figures,
    weighted_auc,
)
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    MELANOMA,
    PREDICTIONS_NAME,
    Predictions,
)
from data_jobs.training.operating_points import OUT_OF_FOLD_SENSITIVITY, choose_points, conformal_thresholds
from data_jobs.training.probabilities import (
    area_under_curve,
    calibration_error,
    softmax,
    weighted_calibration_error,
)
from deployments.classifier.calibration import Calibrator
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import TRAINED, Diagnosis


def test_a_refusal_is_wrong_and_ranks_last(predictions: Predictions) -> None:
    found = challenge_figures(predictions)["isic2019_eight"]
    expected = accuracy_figures(predictions.nine, predictions.labels)
    assert found["refused"] > 0
    assert found["top1"] == expected["top1"]
    assert found["balanced_accuracy"] == expected["balanced_accuracy"]


def test_fewer_images_than_a_quantile_needs_are_all_covered() -> None:
    # The middle 95 % of a beta-binomial: 59 calibration images place the third smallest score.
    assert coverage_range(59, 40, 0.95) == (34, 40)
    assert coverage_range(18, 40, 0.95) == (40, 40)


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


def test_every_source_is_told_by_itself(make_row: Callable[..., LabelledImage]) -> None:
    rows = [make_row(i, i % 8) for i in range(80)]
    rows += [replace(make_row(100 + i, i % 8), source=BCN84, lesion_id=f"BCN_{i}") for i in range(40)]
    logits = np.eye(8, dtype=np.float32)[[row.label for row in rows]]
    logits[80:] = logits[[80 + (i + 1) % 8 for i in range(40)]]
    figures = source_figures(softmax(logits), rows)
    assert (figures["archive"]["images"], figures[BCN84]["images"]) == (80, 40)
    ham, rest = figures["HAM10000"]["images"], figures["archive without HAM10000"]["images"]
    assert ham + rest == 80
    assert min(ham, rest) > 0
    assert figures["archive"]["top1"] == figures["archive"]["melanoma_auc"] == 1.0
    assert figures[BCN84]["top1"] == 0.0


def test_weights_count_as_copies(predictions: Predictions) -> None:
    """A lesion is drawn with all of its images; an image that was drawn twice counts as two."""
    together = resampled_weights(["a", "b", "a", "c"], 200, seed=0)
    assert np.array_equal(together[:, 0], together[:, 2])
    assert np.array_equal(together[:, [0, 1, 3]].sum(1), np.full(200, 3.0))
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
    spans = bootstrap_intervals(predictions, seed=3, resamples=200)
    figures = accuracy_figures(predictions.nine, predictions.labels)
    for name in ("top1", "top3", "balanced_accuracy", "melanoma_auc"):
        low, high = spans[name]
        assert low <= figures[name] <= high
        assert 0.0 < high - low < 0.1
    classes = diagnosis_figures(predictions)
    for name in ("recall", "precision", "auc"):
        assert all(low <= classes[name][d] <= high for d, (low, high) in spans[name].items())


def test_a_worse_vote_is_told_with_its_interval(predictions: Predictions) -> None:
    softmax, melanoma = predictions.eight[:, MELANOMA], predictions.labels == MELANOMA
    same = vote_figures(softmax, predictions, seed=1, resamples=100)
    assert same["vote_16_melanoma_auc"] == same["softmax_melanoma_auc"]
    # Drawn apart, equal scores would differ by chance.
    assert same["vote_minus_softmax_interval"] == (0.0, 0.0)
    noise = np.random.default_rng(8).normal(scale=0.25, size=len(predictions))
    vote = np.round(np.clip(softmax + noise, 0.0, 1.0) * VOTERS) / VOTERS
    found = vote_figures(vote, predictions, seed=1, resamples=100)
    assert found["vote_16_melanoma_auc"] == pytest.approx(area_under_curve(vote, melanoma), abs=1e-4)
    low, high = found["vote_minus_softmax_interval"]
    assert low < found["vote_minus_softmax"] < high < 0.0


def test_a_lesion_counts_once(predictions: Predictions) -> None:
    lesions = lesion_predictions(predictions)
    assert len(lesions) == len({row.lesion for row in predictions.rows})
    pair = [i for i, row in enumerate(predictions.rows) if row.lesion == "HAM_0000008"]
    assert len(pair) == 2
    (at,) = [i for i, row in enumerate(lesions.rows) if row.lesion == "HAM_0000008"]
    assert np.allclose(lesions.nine[at], predictions.nine[pair].mean(0))


def read_predictions(path: Path, rows: Mapping[str, LabelledImage]) -> Predictions:
    """Read what `write_predictions` wrote; `rows` are the archive's, by isic_id."""
    table = pq.read_table(path)
    found = [rows[isic_id] for isic_id in table["isic_id"].to_pylist()]
    assert [row.diagnosis for row in found] == table["truth"].to_pylist()
    nine = np.stack([table[d.value].to_numpy() for d in Diagnosis], axis=1)
    return Predictions(found, nine.astype(np.float64), table["ood_score"].to_numpy().astype(np.float64))


@pytest.fixture(scope="module")
def rows(isic_dir: Path) -> dict[str, LabelledImage]:
    return {row.isic_id: row for row in read_rows(isic_dir)}


@pytest.fixture(scope="module")
def evidence(models: Path, rows: dict[str, LabelledImage]) -> list[tuple[StoredModel, Predictions]]:
    store = ModelStore(models)
    found = [model for model in map(store.open, store) if PREDICTIONS_NAME in model.manifest.files]
    assert found, "no model ships its predictions: there is nothing to hold the figures against"
    return [(model, read_predictions(model.path(PREDICTIONS_NAME), rows)) for model in found]


@pytest.mark.torch
def test_the_shipped_figures_follow_from_the_shipped_predictions(
    evidence: list[tuple[StoredModel, Predictions]], rows: dict[str, LabelledImage]
) -> None:
    """All of `evaluation.json` that needs nothing but answers to the whole of the test fold."""
    pytest.importorskip("matplotlib", reason="needs the train extra")
    from data_jobs.training.evaluate import figures_of, point_figures

    for model, test in evidence:
        told = json.loads(model.path("evaluation.json").read_text())
        fold = {row.isic_id for row in rows.values() if row.fold == told["fold"]}
        assert {row.isic_id for row in test.rows} == fold
        thresholds = Calibrator.from_model(model).thresholds
        calibrated = json.loads(model.path("calibration.json").read_text())
        found = figures_of(test, seed=0, resamples=10)
        for name in ("intervals", "ham10000_intervals"):
            assert found.pop(name).keys() == told[name].keys()
        for name, challenge in found.pop("challenge").items():
            assert_near({key: told["challenge"][name][key] for key in challenge}, challenge)
        found["operating_points"] = point_figures(test, model.manifest)
        found["sets"] = set_figures(test, test.eight >= thresholds, 0.95, calibrated["images_a_class"])
        assert_near({name: told[name] for name in found}, found)


def assert_near(told: Any, found: Any) -> None:
    """The same JSON; the probabilities in the file are float32, so that a figure's last digit may differ."""
    if isinstance(found, dict):
        assert told.keys() == found.keys()
        for name in found:
            assert_near(told[name], found[name])
    elif found and isinstance(found, list) and isinstance(found[0], dict):
        for one, other in zip(told, found, strict=True):
            assert_near(one, other)
    elif isinstance(found, float) and np.isnan(found):
        assert told is None
    else:
        assert told == pytest.approx(found, abs=2e-4)


def test_the_thresholds_follow_from_the_calibration_fold(
    evidence: list[tuple[StoredModel, Predictions]], rows: dict[str, LabelledImage]
) -> None:
    for model, _ in evidence:
        fitted = read_predictions(model.path(CALIBRATION_NAME), rows)
        least = 0.0 if model.manifest.output.members == 1 else OUT_OF_FOLD_SENSITIVITY
        points = choose_points(fitted.eight, fitted.labels, fitted.lesions, least)
        for name, point in model.manifest.operating_points.items():
            assert points[name].threshold == pytest.approx(point.threshold, abs=5e-6), name
            assert (points[name].positives, points[name].misses) == (point.positives, point.misses)
        conformal = model.manifest.conformal
        alone = model.manifest.output.members == 1
        told = np.ones(len(fitted), np.bool_) if alone else first_images(fitted.lesions)
        thresholds = conformal_thresholds(
            fitted.eight[told], fitted.labels[told], conformal.coverage, together=not alone
        )
        assert thresholds == pytest.approx([conformal.thresholds[d] for d in TRAINED], abs=5e-6)

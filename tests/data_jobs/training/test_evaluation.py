"""Every figure that a model is judged by: counts, curves, sets, intervals, and the neighbours' vote."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_jobs.training.dataset import LabelledImage, read_rows
from data_jobs.training.embedding_spaces import VOTERS, vote_figures
from data_jobs.training.evaluation.figures import (
    READINGS,
    SEVEN,
    SMALLEST,
    accuracy_figures,
    bootstrap_intervals,
    challenge_figures,
    confusion_matrix,
    coverage_range,
    diagnosis_figures,
    interval,
    lesion_diagnosis_figures,
    lesion_figures,
    lesion_predictions,
    melanoma_curve,
    merge_to_seven,
    reliability_bins,
    resampled_weights,
    scored,
    sensitivity_specificity,
    set_figures,
    subgroup_figures,
    weighted_auc,
    weighted_calibration_error,
)
from data_jobs.training.evaluation.predictions import (
    CALIBRATION_NAME,
    MELANOMA,
    PREDICTIONS_NAME,
    Predictions,
    write_predictions,
)
from data_jobs.training.operating_points import choose_points, conformal_thresholds
from data_jobs.training.probabilities import area_under_curve, calibration_error, softmax
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import TRAINED, Diagnosis


def test_figures_a_diagnosis_agree_with_the_confusion_matrix(predictions: Predictions) -> None:
    figures = diagnosis_figures(predictions)
    matrix = confusion_matrix(predictions.nine, predictions.labels)
    assert matrix.sum() == len(predictions)
    for index, diagnosis in enumerate(TRAINED):
        assert figures["confusion"][diagnosis] == matrix[index].tolist()
        assert figures["images_a_class"][diagnosis] == matrix[index].sum()
        assert figures["recall"][diagnosis] == pytest.approx(
            matrix[index, index] / matrix[index].sum(), abs=1e-4
        )
        assert figures["precision"][diagnosis] == pytest.approx(
            matrix[index, index] / matrix[:, index].sum(), abs=1e-4
        )


def test_a_lesion_counts_once(predictions: Predictions) -> None:
    lesions = lesion_predictions(predictions)
    keys = {row.lesion for row in predictions.rows}
    assert len(lesions) == len(keys) == len({row.lesion for row in lesions.rows})
    assert np.allclose(lesions.nine.sum(1), 1.0)
    pair = [i for i, row in enumerate(predictions.rows) if row.lesion == "HAM_0000008"]
    assert len(pair) == 2
    (at,) = [i for i, row in enumerate(lesions.rows) if row.lesion == "HAM_0000008"]
    assert np.allclose(lesions.nine[at], predictions.nine[pair].mean(0))
    assert lesion_figures(predictions)["lesions"] == len(keys)
    assert "images" not in lesion_figures(predictions)
    classes = lesion_diagnosis_figures(predictions)
    assert sum(classes["lesions_a_class"].values()) == len(keys)
    assert np.mean(list(classes["recall"].values())) == pytest.approx(
        lesion_figures(predictions)["balanced_accuracy"], abs=1e-4
    )


def test_small_groups_are_left_out(predictions: Predictions) -> None:
    groups = subgroup_figures(predictions)
    assert all(figures["images"] >= SMALLEST for figures in groups.values())
    ham = int(predictions.of_ham10000.sum())
    assert groups["source: HAM10000"]["images"] == ham
    ages = sum(figures["images"] for name, figures in groups.items() if name.startswith("age: "))
    assert ages == len(predictions)


def test_predictions_survive_their_file(predictions: Predictions, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    write_predictions(path, predictions)
    rows = {row.isic_id: row for row in predictions.rows}
    read = read_predictions(path, rows)
    assert read.rows == predictions.rows
    assert np.allclose(read.nine, predictions.nine, atol=1e-7)
    assert accuracy_figures(read.nine, read.labels) == accuracy_figures(predictions.nine, predictions.labels)
    assert path.stat().st_size < 60 * len(predictions)


def test_keratosis_and_carcinoma_in_situ_are_one_class() -> None:
    seven = merge_to_seven(np.eye(8))
    assert seven.shape == (8, 7)
    for diagnosis in TRAINED:
        merged = "AKIEC" if diagnosis in {Diagnosis.AK, Diagnosis.SCC} else diagnosis.value
        assert SEVEN[int(seven[TRAINED.index(diagnosis)].argmax())] == merged


def test_a_refusal_is_wrong_and_ranks_last(predictions: Predictions) -> None:
    found = challenge_figures(predictions)["isic2019_eight"]
    expected = accuracy_figures(predictions.nine, predictions.labels)
    assert found["refused"] > 0
    assert found["top1"] == expected["top1"]
    assert found["balanced_accuracy"] == expected["balanced_accuracy"]
    nobody = scored(np.eye(3), np.arange(3), np.ones(3, dtype=bool), ("a", "b", "c"))
    assert (nobody["top1"], nobody["balanced_accuracy"], nobody["auc"]["a"]) == (0.0, 0.0, 0.5)


def test_a_curve_by_hand() -> None:
    scores = np.array([0.9, 0.4, 0.4, 0.8, 0.1])
    positive = np.array([True, True, False, False, False])
    thresholds, sensitivity, specificity = sensitivity_specificity(scores, positive)
    assert thresholds.tolist() == [0.9, 0.4]
    assert sensitivity.tolist() == [0.5, 1.0]
    assert specificity == pytest.approx([1.0, 1 / 3])
    with pytest.raises(ValueError, match="positives and negatives"):
        sensitivity_specificity(scores, np.ones(5, dtype=bool))


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


def test_fewer_images_than_a_quantile_needs_are_all_covered() -> None:
    # The middle 95 % of a beta-binomial: 59 calibration images place the third smallest score.
    assert coverage_range(59, 40, 0.95) == (34, 40)
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


def test_no_value_no_interval() -> None:
    assert np.isnan(interval(np.array([np.nan, np.nan]))).all()
    assert interval(np.array([np.nan, 0.5, 0.5])) == (0.5, 0.5)


RESAMPLES = 300


@pytest.fixture
def vote(predictions: Predictions) -> np.ndarray:
    """The softmax, blurred and in sixteenths: right less often."""
    noise = np.random.default_rng(8).normal(scale=0.25, size=len(predictions))
    return np.round(np.clip(predictions.eight[:, MELANOMA] + noise, 0.0, 1.0) * VOTERS) / VOTERS


def test_a_vote_that_says_what_the_softmax_says_differs_in_nothing(predictions: Predictions) -> None:
    found = vote_figures(predictions.eight[:, MELANOMA], predictions, seed=1, resamples=RESAMPLES)
    assert found["vote_16_melanoma_auc"] == found["softmax_melanoma_auc"]
    # Drawn apart, equal scores would differ by chance.
    assert found["vote_minus_softmax_interval"] == (0.0, 0.0)


def test_a_worse_vote_is_told_with_its_interval(predictions: Predictions, vote: np.ndarray) -> None:
    found = vote_figures(vote, predictions, seed=1, resamples=RESAMPLES)
    melanoma = predictions.labels == MELANOMA
    assert found["vote_16_melanoma_auc"] == pytest.approx(area_under_curve(vote, melanoma), abs=1e-4)
    assert found["softmax_melanoma_auc"] == pytest.approx(
        area_under_curve(predictions.eight[:, MELANOMA], melanoma), abs=1e-4
    )
    low, high = found["vote_minus_softmax_interval"]
    assert low < found["vote_minus_softmax"] < high < 0.0
    assert found["vote_minus_softmax"] == pytest.approx(
        found["vote_16_melanoma_auc"] - found["softmax_melanoma_auc"], abs=2e-4
    )


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

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.evaluation.figures import (
    SEVEN,
    SMALLEST,
    accuracy_figures,
    challenge_figures,
    confusion_matrix,
    diagnosis_figures,
    lesion_diagnosis_figures,
    lesion_figures,
    lesion_predictions,
    merge_to_seven,
    scored,
    subgroup_figures,
)
from data_jobs.training.evaluation.predictions import (
    UNKNOWN,
    Predictions,
    read_predictions,
    write_predictions,
)
from data_jobs.training.probabilities import class_precision
from serve_app.domain.diagnosis import TRAINED, Diagnosis


def test_unk_first_is_wrong(predictions: Predictions) -> None:
    nine = predictions.nine.copy()
    before = accuracy_figures(nine, predictions.labels)["top1"]
    right = nine.argmax(1) == predictions.labels
    nine[right, UNKNOWN] = 2.0
    assert before > 0.5
    assert accuracy_figures(nine, predictions.labels)["top1"] == 0.0


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


def test_precision_of_an_answer_never_given() -> None:
    p = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0]])
    found = class_precision(p, np.array([0, 1]), 3)
    assert found[0] == 0.5
    assert np.isnan(found[1:]).all()


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
    first = predictions.rows[0]
    other = next(d for d in TRAINED if d is not first.diagnosis)
    rows[first.isic_id] = replace(first, diagnosis=other)
    with pytest.raises(ValueError, match=first.isic_id):
        read_predictions(path, rows)


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


def test_seven_classes_are_of_ham10000_alone(predictions: Predictions) -> None:
    found = challenge_figures(predictions)["isic2018_seven_ham10000"]
    assert found["images"] == int(predictions.of_ham10000.sum())
    assert set(found["auc"]) == set(SEVEN)

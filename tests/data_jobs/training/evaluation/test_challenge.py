from __future__ import annotations

from importlib.util import find_spec
import sys
from typing import Any

import numpy as np
import pytest

from data_jobs.training.evaluation.challenge import (
    PACKAGE,
    SEVEN,
    challenge_figures,
    merge_to_seven,
    official_scores,
    scored,
)
from data_jobs.training.evaluation.figures import accuracy_figures
from data_jobs.training.evaluation.predictions import Predictions
from serve_app.domain.diagnosis import TRAINED, Diagnosis

# Not importorskip: an import would replace parts of `zipfile` in this very process.
INSTALLED = find_spec(PACKAGE) is not None


@pytest.fixture(scope="module")
def figures(predictions: Predictions) -> dict[str, Any]:
    return challenge_figures(predictions)


def test_keratosis_and_carcinoma_in_situ_are_one_class() -> None:
    seven = merge_to_seven(np.eye(8))
    assert seven.shape == (8, 7)
    for diagnosis in TRAINED:
        merged = "AKIEC" if diagnosis in {Diagnosis.AK, Diagnosis.SCC} else diagnosis.value
        assert SEVEN[int(seven[TRAINED.index(diagnosis)].argmax())] == merged


def test_a_refusal_is_wrong_and_ranks_last(predictions: Predictions, figures: dict[str, Any]) -> None:
    found = figures["isic2019_eight"]
    expected = accuracy_figures(predictions.nine, predictions.labels)
    assert found["refused"] > 0
    assert found["top1"] == expected["top1"]
    assert found["balanced_accuracy"] == expected["balanced_accuracy"]
    nobody = scored(np.eye(3), np.arange(3), np.ones(3, dtype=bool), ("a", "b", "c"))
    assert (nobody["top1"], nobody["balanced_accuracy"], nobody["auc"]["a"]) == (0.0, 0.0, 0.5)


def test_seven_classes_are_of_ham10000_alone(predictions: Predictions, figures: dict[str, Any]) -> None:
    found = figures["isic2018_seven_ham10000"]
    assert found["images"] == int(predictions.of_ham10000.sum())
    assert set(found["auc"]) == set(SEVEN)


@pytest.mark.torch
def test_figures_against_the_challenges_own_scoring(figures: dict[str, Any]) -> None:
    for found in figures.values():
        official = found["official"]
        assert (official is not None) == INSTALLED
        if official is None:
            continue
        assert official["balanced_accuracy"] == pytest.approx(found["balanced_accuracy"], abs=1e-4)
        assert official["mean_auc"] == pytest.approx(found["mean_auc"], abs=1e-4)
        for name, scores in official["classes"].items():
            assert scores["auc"] == pytest.approx(found["auc"][name], abs=1e-4)


@pytest.mark.torch
def test_without_images_of_a_class_there_is_no_official_score() -> None:
    assert official_scores(np.eye(3)[:2], np.arange(2), ("a", "b", "c")) is None


@pytest.mark.torch
def test_the_official_scoring_leaves_this_process_alone(figures: dict[str, Any]) -> None:
    """Imported here it would replace parts of `zipfile`."""
    assert (figures["isic2019_eight"]["official"] is not None) == INSTALLED
    assert PACKAGE not in sys.modules

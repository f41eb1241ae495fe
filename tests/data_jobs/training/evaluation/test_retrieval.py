"""The neighbours' vote beside the softmax: one set of images, one set of resamples."""

from __future__ import annotations

import numpy as np
import pytest

from data_jobs.training.embedding_spaces import VOTERS, vote_figures
from data_jobs.training.evaluation.intervals import resampled_weights, weighted_auc
from data_jobs.training.evaluation.predictions import MELANOMA, Predictions
from data_jobs.training.probabilities import area_under_curve

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


def test_pairing_leaves_out_what_both_share(predictions: Predictions, vote: np.ndarray) -> None:
    low, high = vote_figures(vote, predictions, seed=1, resamples=RESAMPLES)["vote_minus_softmax_interval"]
    melanoma, softmax = predictions.labels == MELANOMA, predictions.eight[:, MELANOMA]
    one, other = (resampled_weights(predictions.lesions, RESAMPLES, seed) for seed in (1, 2))
    apart = weighted_auc(vote, melanoma, one) - weighted_auc(softmax, melanoma, other)
    assert high - low < np.subtract(*np.quantile(apart, (0.975, 0.025)))

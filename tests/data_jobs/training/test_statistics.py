from __future__ import annotations

import numpy as np
import pytest

from data_jobs.training.operating_points import (
    choose_threshold,
    conformal_threshold,
    count_below,
    lower_bound,
    misses_allowed,
)
from data_jobs.training.outliers import CLINICAL
from data_jobs.training.probabilities import (
    PRIOR_SHIFTS,
    TOP1_TOLERANCE,
    calibration_error,
    fit_prior_shift,
    fit_temperature,
    softmax,
)
from data_jobs.training.unknown import (
    Examples,
    cross_fitted,
    fit_head,
    fit_logistic,
    fit_statistics,
    unknown_probability,
)


@pytest.mark.parametrize(("misses", "needed"), [(0, 59), (1, 93), (2, 124), (3, 153), (5, 208), (10, 336)])
def test_clopper_pearson_against_the_published_table(misses: int, needed: int) -> None:
    assert lower_bound(needed - misses, needed) >= 0.95
    assert lower_bound(needed - 1 - misses, needed - 1) < 0.95
    assert misses_allowed(needed) == misses
    assert misses_allowed(needed - 1) == misses - 1


def test_conformal_threshold_by_hand() -> None:
    scores = np.arange(1, 20) / 20.0
    # n = 19: k = floor(0.05 * 20) = 1, the smallest; 0.1 * 20 = 2, the second.
    assert conformal_threshold(scores, 0.95) == 0.05
    assert conformal_threshold(scores, 0.90) == 0.10
    # n = 18: k = 0, nothing finite keeps the promise.
    assert conformal_threshold(scores[:18], 0.95) == 0.0


def test_temperature_and_prior_are_recovered() -> None:
    rng = np.random.default_rng(5)
    prior = np.array([0.7, 0.2, 0.1])
    truth = rng.normal(scale=2.0, size=(30000, 3)) + np.log(prior)
    p = softmax(truth)
    labels = (p.cumsum(1) < rng.random((len(p), 1))).sum(1)
    assert fit_temperature(2.5 * truth, labels) == pytest.approx(2.5, rel=0.05)
    flat, shifts = truth - 0.5 * np.log(prior), PRIOR_SHIFTS
    shift, temperature = fit_prior_shift(flat, labels, prior)
    right = [((flat + s * np.log(prior)).argmax(1) == labels).mean() for s in shifts]
    good = [s for s, share in zip(shifts, right, strict=True) if share >= max(right) - TOP1_TOLERANCE]
    assert shift == good[0] <= 0.5
    assert right[0] < max(right) - TOP1_TOLERANCE  # so that there was something to restore
    assert temperature == pytest.approx(1.0, rel=0.15)
    assert calibration_error(p, labels) < 0.02
    assert calibration_error(softmax(3.0 * truth), labels) > 0.05


def test_an_operating_point_keeps_its_bound() -> None:
    rng = np.random.default_rng(7)
    positive = np.arange(1000) < 284
    scores = np.where(positive, rng.beta(5, 2, 1000), rng.beta(2, 5, 1000))
    point = choose_threshold(scores, positive)
    assert (point.positives, point.misses) == (284, 5)
    assert point.lower_bound >= 0.95
    # Chosen with more certainty than it is reported with: one miss more would still prove 0.95.
    assert lower_bound(284 - 6, 284) >= 0.95
    assert choose_threshold(scores, positive, confidence=0.95).misses == 7
    with pytest.raises(ValueError, match="cannot prove"):
        choose_threshold(scores[:40], positive[:40])


def test_features_off_the_classes_are_unknown_even_when_near() -> None:
    rng = np.random.default_rng(11)
    labels = rng.integers(0, 8, 2500)
    means = rng.normal(size=(8, 32)) * 3.0
    known = means[labels] + rng.normal(size=(2500, 32))
    # Right among the classes, but off along one direction that no class uses.
    outliers = means[labels[:400]] + rng.normal(size=(400, 32))
    known[:, 0], outliers[:, 0] = rng.normal(size=2500), 9.0 + rng.normal(size=400)
    statistics = fit_statistics(known[:2000], labels[:2000], outliers[:200])
    near, far = statistics.score(known[2000:]), statistics.score(outliers)
    slope, intercept = fit_logistic(near, far[:200])
    assert slope > 0
    u = unknown_probability(near, slope, intercept)
    assert np.median(u) < 0.02
    assert np.median(unknown_probability(far[200:], slope, intercept)) > 0.9
    # Unlike any outlier fitted on, and as far from every class.
    beyond = statistics.score(rng.normal(size=(50, 32)) * 30.0)
    assert np.median(unknown_probability(beyond, slope, intercept)) > 0.9


def test_a_rare_class_beside_the_outliers_is_known() -> None:
    """By images, the direction would be that from the common class to all else, the rare class among it."""
    rng = np.random.default_rng(12)
    labels = np.where(np.arange(3000) % 100 == 0, 1, 0)
    known, outliers = rng.normal(size=(3000, 32)), rng.normal(size=(300, 32))
    known[labels == 1, 0] += 8.0
    outliers[:, 0] += 8.0
    outliers[:, 1] += 3.0
    statistics = fit_statistics(known[:2000], labels[:2000], outliers[:150])
    near, far = statistics.score(known[2000:]), statistics.score(outliers)
    slope, intercept = fit_logistic(near, far[:150])
    assert np.mean(unknown_probability(far[150:], slope, intercept) > 0.5) > 0.75
    assert np.mean(unknown_probability(near[labels[2000:] == 1], slope, intercept) > 0.5) < 0.2


def examples(measures: np.ndarray, kinds: list[str]) -> Examples:
    """Every image in a group of two."""
    return Examples(
        measures, np.resize(kinds, len(measures)), np.array([f"g{i // 2}" for i in range(len(measures))])
    )


def test_a_head_knows_kinds_it_was_never_told_of() -> None:
    rng = np.random.default_rng(13)
    known = examples(rng.normal(size=(1200, 24)), ["archive", "bcn84"])
    measures = rng.normal(size=(240, 24))
    measures[::2, 3] += 7.0  # photographs
    measures[1::2, 9] -= 7.0
    outliers = examples(measures, [CLINICAL, "eye"])
    # What clinical photographs weigh does not depend on how many there are.
    assert outliers.weights[::2].sum() == pytest.approx(0.6)
    assert known.weights[::2].sum() == pytest.approx(0.5)
    line = fit_logistic(*cross_fitted(known, outliers), weights=outliers.weights)
    head = fit_head(known, outliers)
    assert np.mean(unknown_probability(head.score(rng.normal(size=(400, 24))), *line) >= 0.2) <= 0.03
    # Far along measures that no outlier had: by the distance alone.
    strange = rng.normal(size=(60, 24))
    strange[:, 15:20] += 6.0
    assert np.mean(unknown_probability(head.score(strange), *line) >= 0.2) > 0.95


def test_a_weight_an_outlier_moves_the_line() -> None:
    rng = np.random.default_rng(14)
    known, other = (
        rng.normal(size=500),
        np.concatenate([rng.normal(0.5, 1.0, 100), rng.normal(5.0, 1.0, 100)]),
    )
    near = np.repeat([1.0, 0.01], 100)
    assert fit_logistic(known, other) == fit_logistic(known, other, weights=np.ones(200))
    told = [
        unknown_probability(np.array([5.0]), *fit_logistic(known, other, weights=w))
        for w in (near, near[::-1])
    ]
    assert told[0] < told[1]


def test_what_a_fraction_of_a_threshold_still_raises() -> None:
    scores = np.array([0.1, 0.3, 0.39, 0.4, 0.25, 0.21, 0.05])
    positive = np.array([True, True, True, True, False, False, False])
    assert count_below(scores, positive, 0.4, (0.9, 0.5)) == {
        "0.9": {"missed_lesions_raised": 1, "other_lesions_raised": 0},
        "0.5": {"missed_lesions_raised": 2, "other_lesions_raised": 2},
    }

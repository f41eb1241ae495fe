"""Every part of a fold is judged by a fit that never saw it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.cross_fitting import (
    PARTS,
    CrossFit,
    cross_fit,
    part_of,
    read_cross_fit,
    write_cross_fit,
)
from data_jobs.training.probabilities import Floats, Labels
from serve_app.domain.diagnosis import TRAINED

CLASSES = len(TRAINED)
PRIOR = np.full(CLASSES, 1.0 / CLASSES)


@pytest.fixture(scope="module")
def fold() -> tuple[Floats, Floats, Labels, list[str]]:
    """2,400 images of 1,200 lesions: logits that are mostly right, out-of-distribution scores, labels, lesions."""
    rng = np.random.default_rng(5)
    lesions = np.repeat([f"lesion {n}" for n in range(1200)], 2).tolist()
    labels = np.repeat(rng.integers(0, CLASSES, 1200), 2)
    logits = rng.normal(size=(2400, CLASSES)) + 3.0 * np.eye(CLASSES)[labels]
    return logits, rng.gamma(4.0, 0.2, 2400), labels, lesions


def _fit(logits: Floats, scores: Floats, labels: Labels, lesions: list[str]) -> CrossFit:
    outliers = np.random.default_rng(6).gamma(40.0, 0.2, 300)
    return cross_fit(
        logits, scores, labels, lesions, shift=0.3, prior=PRIOR, outlier_scores=outliers, coverage=0.95
    )


def test_lesions_are_spread_over_all_parts() -> None:
    counts = np.bincount([part_of(f"lesion {n}") for n in range(1000)], minlength=PARTS)
    assert counts.min() > 150
    assert part_of("HAM_0000001") == part_of("HAM_0000001")


def test_a_fit_does_not_change_with_what_it_must_not_see(
    fold: tuple[Floats, Floats, Labels, list[str]],
) -> None:
    logits, scores, labels, lesions = fold
    before = _fit(*fold)
    own = np.array([part_of(lesion) == 2 for lesion in lesions])
    other_logits, other_scores, other_labels = logits.copy(), scores.copy(), labels.copy()
    other_logits[own] = -other_logits[own]
    other_scores[own] += 5.0
    other_labels[own] = (other_labels[own] + 1) % CLASSES
    after = _fit(other_logits, other_scores, other_labels, lesions)
    assert after.fits[2] == before.fits[2]
    assert all(after.fits[part] != before.fits[part] for part in range(PARTS) if part != 2)


def test_parts_are_judged_nearly_as_the_whole_would_be(
    fold: tuple[Floats, Floats, Labels, list[str]],
) -> None:
    temperatures = [fit.temperature for fit in _fit(*fold).fits]
    assert max(temperatures) / min(temperatures) < 1.1


def test_a_cross_fit_is_read_as_it_was_written(
    tmp_path: Path, fold: tuple[Floats, Floats, Labels, list[str]]
) -> None:
    assert read_cross_fit(tmp_path) is None
    fit = _fit(*fold)
    write_cross_fit(tmp_path, fit)
    assert read_cross_fit(tmp_path) == fit


def test_the_served_shift_is_taken_back(fold: tuple[Floats, Floats, Labels, list[str]]) -> None:
    logits, _, labels, _ = fold
    prior = np.bincount(labels, minlength=CLASSES) / len(labels)
    fit = _fit(*fold)
    moved = CrossFit(tuple(prior.tolist()), fit.fits).logits(0, logits)
    assert moved == pytest.approx(logits + fit.fits[0].moved * np.log(prior), rel=1e-5)

from __future__ import annotations

import numpy as np
import pytest

from data_jobs.training.ranking import area_under_curve
from data_jobs.training.scan import Scan
from data_jobs.training.unknown_scores import (
    log_sum_exp,
    mahalanobis,
    neighbour_distance,
    virtual_logit,
)

RNG = np.random.default_rng(21)
WIDTH, CLASSES = 24, 5
MEANS = RNG.normal(size=(CLASSES, WIDTH)) * 2.0
LABELS = RNG.integers(0, CLASSES, 1200)
TRAIN = (MEANS[LABELS] + RNG.normal(size=(1200, WIDTH))).astype(np.float32)
WEIGHTS, BIAS = RNG.normal(size=(WIDTH, CLASSES)), RNG.normal(size=CLASSES)


def _scan(features: np.ndarray) -> Scan:
    return Scan((features @ WEIGHTS + BIAS).astype(np.float32), features.astype(np.float32))


def test_a_virtual_logit_by_its_definition() -> None:
    """With the last layer in hand, as the paper writes it; the code has to find the layer again."""
    new = RNG.normal(size=(40, WIDTH)) * 3.0
    origin = -np.linalg.pinv(WEIGHTS.T) @ BIAS
    centred = TRAIN - origin
    values, vectors = np.linalg.eigh(
        np.cov(centred.T, bias=True) + np.outer(centred.mean(0), centred.mean(0))
    )
    rest = vectors[:, np.argsort(values)[: WIDTH // 2]]
    alpha = (TRAIN @ WEIGHTS + BIAS).max(1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()
    expected = alpha * np.linalg.norm((new - origin) @ rest, axis=1) - log_sum_exp(new @ WEIGHTS + BIAS)
    assert virtual_logit(_scan(TRAIN), _scan(new)) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_every_score_finds_what_is_far_away() -> None:
    near = MEANS[LABELS[:200]] + RNG.normal(size=(200, WIDTH))
    far = RNG.normal(size=(200, WIDTH)) * 12.0
    scores = {
        "mahalanobis": lambda f: mahalanobis(TRAIN, LABELS, f),
        "kNN": lambda f: neighbour_distance(TRAIN, f, 10),
        "ViM": lambda f: virtual_logit(_scan(TRAIN), _scan(f)),
    }
    for name, score in scores.items():
        both = np.concatenate([score(near), score(far)])
        assert area_under_curve(both, np.arange(400) >= 200) > 0.9, name


def test_too_few_neighbours() -> None:
    with pytest.raises(ValueError, match="neighbour number 50"):
        neighbour_distance(TRAIN[:20], TRAIN[:2], 50)


@pytest.mark.torch
def test_distances_against_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors", reason="needs the train extra")
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    new = RNG.normal(size=(60, WIDTH)) * 3.0
    units = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (TRAIN.astype(float), new)]
    exact, _ = neighbors.NearestNeighbors(n_neighbors=10).fit(units[0]).kneighbors(units[1])
    assert neighbour_distance(TRAIN, new, 10) == pytest.approx(exact[:, -1], abs=1e-6)

    analysis = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(
        TRAIN.astype(float), LABELS
    )
    inverse = np.linalg.inv(analysis.covariance_)
    expected = np.min([np.einsum("nd,de,ne->n", new - m, inverse, new - m) for m in analysis.means_], axis=0)
    # 0.1 % of the covariance is shrunk to the identity.
    assert mahalanobis(TRAIN, LABELS, new) == pytest.approx(expected, rel=0.02)

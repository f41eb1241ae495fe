"""Pairs of one lesion and of two, and what a limit would question."""

from __future__ import annotations

import numpy as np

from data_jobs.training.dataset import read_rows
from data_jobs.training.lesion_pairs import measure, pair_up, report


def test_true_pairs_are_of_one_lesion_and_the_others_of_two(make_row) -> None:
    rows = [make_row(i) for i in range(20)]
    true, different = pair_up(rows, seed=1, count=50)
    assert {tuple(pair) for pair in true} == {
        (i, j) for i in range(20) for j in range(20) if i != j and rows[i].lesion == rows[j].lesion
    }
    assert len(different) == 50
    assert all(rows[i].lesion != rows[j].lesion for i, j in different)


def test_shares_below_a_limit(make_row) -> None:
    rows = [make_row(i) for i in (2, 3, 4, 5)]
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1]], np.float32)
    found = report(rows, vectors, np.array([2, 0, 0, 0]), (0.5, 0.7), pairs=40)
    one = found["one lesion"]
    assert (one["pairs"], one["level falls"]) == (4, 0.25)
    assert one["questioned below"]["0.50"]["all"] == 0.0
    assert one["questioned below"]["0.70"] == {"all": 0.5, "level falls": 1.0, "level stays or rises": 0.3333}
    # As many as were drawn of two lesions, at most those asked for.
    assert 20 < found["two lesions"]["pairs"] <= 40


def test_the_archives_images_are_embedded_and_judged(isic_dir, models, model_id) -> None:
    rows = [row for row in read_rows(isic_dir) if row.fold == 0 and row.lesion_id][:12]
    vectors, levels = measure(models / model_id, rows, isic_dir)
    assert vectors.shape == (12, 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert set(levels) <= {0, 1, 2}

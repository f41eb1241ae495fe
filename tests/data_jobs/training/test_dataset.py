from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_jobs.references.bundle import choose_references
from data_jobs.training.dataset import fold_indices, labels_of, read_pixels, read_rows, training_indices
from data_jobs.training.recipe import read_recipe
from deployments.preprocess.resize import InputGeometry
from serve_app.domain.diagnosis import TRAINED

PLAN = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite0.toml")).data


def test_no_lesion_is_on_both_sides_of_the_split(isic_dir: Path) -> None:
    rows = read_rows(isic_dir)
    folds: dict[str, set[int]] = {}
    for row in rows:
        folds.setdefault(row.lesion, set()).add(row.fold)
    assert all(len(found) == 1 for found in folds.values())


def test_the_test_fold_is_never_trained_on(isic_dir: Path) -> None:
    rows = read_rows(isic_dir)
    trained = training_indices(rows, PLAN)
    assert {rows[i].fold for i in trained} == {1, 2, 3}
    assert not set(trained) & set(fold_indices(rows, [PLAN.test_fold]))
    assert set(labels_of(rows)) == set(range(len(TRAINED)))


def test_a_lesion_moved_across_the_split_is_found(isic_dir: Path) -> None:
    rows = read_rows(isic_dir)
    trained = training_indices(rows, PLAN)
    first = next(rows[i] for i in trained if rows[i].lesion_id)
    leaked = [*rows, replace(first, fold=PLAN.test_fold)]
    with pytest.raises(ValueError, match="both sides"):
        training_indices(leaked, PLAN)


def test_pixels_come_at_the_asked_size(isic_dir: Path) -> None:
    row = read_rows(isic_dir)[0]
    pixels = read_pixels(row, isic_dir, InputGeometry(160))
    assert pixels.shape == (160, 160, 3)
    assert pixels.dtype == np.uint8


def test_references_are_confirmed_and_not_of_the_test_fold(isic_dir: Path) -> None:
    rows = choose_references(read_rows(isic_dir))
    assert len(rows) == 4000
    assert all(row.fold != PLAN.test_fold and row.diagnosis_confirm_type for row in rows)
    assert len({row.lesion for row in rows}) == len(rows)
    assert {row.diagnosis for row in rows} == set(TRAINED)

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_jobs.references.bundle import choose_references
from data_jobs.training.dataset import (
    BCN84,
    excluded_lesions,
    fold_indices,
    labels_of,
    read_bcn84,
    read_pixels,
    read_rows,
    reserve,
    sources_of,
    training_indices,
)
from data_jobs.training.recipe import read_recipe
from deployments.preprocess.pixels import InputGeometry
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


def test_members_share_a_reserve_that_none_trains_on(isic_dir: Path) -> None:
    """A tenth of the lesions of every diagnosis and source; every other lesion is left out by one member alone."""
    rows = read_rows(isic_dir) + read_bcn84(isic_dir)
    recipe = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml"))
    apart = reserve(rows, recipe.data)
    assert apart == reserve(list(reversed(rows)), recipe.data)
    kept = [row for row in rows if row.fold in recipe.data.train_folds]
    for key in {(row.source, row.diagnosis) for row in kept}:
        lesions = {row.lesion for row in kept if (row.source, row.diagnosis) == key}
        assert len(lesions & apart) / len(lesions) == pytest.approx(0.1, abs=0.02)
    trained = [set(training_indices(rows, recipe.member(fold).data)) for fold in recipe.data.train_folds]
    used = set.union(*trained)
    assert all(sum(i in member for member in trained) == 3 for i in used)
    assert not {rows[i].lesion for i in used} & (apart | excluded_lesions())
    assert not {rows[i].lesion for i in used} & {row.lesion for row in rows if row.fold == 0}
    assert set(sources_of([rows[i] for i in used])) == {0, 1}


def test_the_other_hospital_is_read_at_its_own_size(isic_dir: Path) -> None:
    rows = read_bcn84(isic_dir)
    assert len(rows) == 11_964
    assert {(row.source, row.aspect) for row in rows} == {(BCN84, "true")}
    assert not {row.isic_id for row in rows} & {row.isic_id for row in read_rows(isic_dir)}
    assert read_pixels(rows[0], isic_dir, InputGeometry(84)).shape == (84, 84, 3)


def test_pixels_come_at_the_asked_size(isic_dir: Path) -> None:
    row = read_rows(isic_dir)[0]
    pixels = read_pixels(row, isic_dir, InputGeometry(160))
    assert pixels.shape == (160, 160, 3)
    assert pixels.dtype == np.uint8


def test_references_are_confirmed_and_not_of_the_test_fold(isic_dir: Path) -> None:
    rows = choose_references(read_rows(isic_dir))
    assert len(rows) == 4000
    assert all(row.fold != PLAN.test_fold and row.diagnosis_confirm_type for row in rows)
    assert len({row.lesion for row in rows} - excluded_lesions()) == len(rows)
    assert {row.diagnosis for row in rows} == set(TRAINED)

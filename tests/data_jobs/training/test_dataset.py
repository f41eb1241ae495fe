from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.references.bundle import choose_references
from data_jobs.training.dataset import (
    BCN84,
    EXCLUDED,
    LabelledImage,
    build_cache,
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
from data_jobs.training.embedding_spaces import pair_figures
from data_jobs.training.recipe import read_recipe
from deployments.preprocess.pixels import InputGeometry
from serve_app.domain.diagnosis import TRAINED

RECIPES = Path("data_jobs/training/recipes")
PLAN = read_recipe(RECIPES / "tf_efficientnet_lite0_derm7.toml").data


@pytest.fixture(scope="module")
def rows(isic_dir: Path) -> list[LabelledImage]:
    return read_rows(isic_dir)


@pytest.fixture(scope="module")
def bcn84(isic_dir: Path) -> list[LabelledImage]:
    return read_bcn84(isic_dir)


def test_the_test_fold_is_never_trained_on(rows: list[LabelledImage]) -> None:
    folds: dict[str, set[int]] = {}
    for row in rows:
        folds.setdefault(row.lesion, set()).add(row.fold)
    assert all(len(found) == 1 for found in folds.values()), "no lesion is on both sides of the split"
    trained = training_indices(rows, PLAN)
    assert {rows[i].fold for i in trained} == {1, 2, 3}
    assert not set(trained) & set(fold_indices(rows, [PLAN.test_fold]))
    assert set(labels_of(rows)) == set(range(len(TRAINED)))
    first = next(rows[i] for i in trained if rows[i].lesion_id)
    with pytest.raises(ValueError, match="both sides"):
        training_indices([*rows, replace(first, fold=PLAN.test_fold)], PLAN)


def test_members_share_a_reserve_that_none_trains_on(
    rows: list[LabelledImage], bcn84: list[LabelledImage]
) -> None:
    """A tenth of the lesions of every diagnosis and source; every other lesion is left out by one member alone."""
    rows = rows + bcn84
    recipe = read_recipe(RECIPES / "tf_efficientnet_lite2_derm10.toml")
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


def test_one_lesion_under_two_names_is_out_of_training_and_never_of_the_test_fold(
    rows: list[LabelledImage], bcn84: list[LabelledImage]
) -> None:
    by_id = {row.isic_id: row for row in rows + bcn84}
    excluded = json.loads(EXCLUDED.read_text())
    assert excluded
    for lesion, twin in excluded.items():
        dropped, kept = by_id[twin["image"]], by_id[twin["twin"]]
        assert (dropped.lesion, dropped.fold, kept.fold) == (lesion, twin["fold"], twin["twin_fold"])
        assert dropped.fold not in {0, kept.fold}


def test_images_of_both_hospitals_come_at_the_asked_size(
    rows: list[LabelledImage], bcn84: list[LabelledImage], isic_dir: Path, tmp_path: Path
) -> None:
    assert len(bcn84) == 11_964
    assert {(row.source, row.aspect) for row in bcn84} == {(BCN84, "true")}
    assert not {row.isic_id for row in bcn84} & {row.isic_id for row in rows}
    assert read_pixels(bcn84[0], isic_dir, InputGeometry(84)).shape == (84, 84, 3)
    cached = build_cache(rows[:3], isic_dir, tmp_path, InputGeometry(160))
    assert (cached.shape, cached.dtype) == ((3, 160, 160, 3), np.uint8)
    assert np.array_equal(cached[2], read_pixels(rows[2], isic_dir, InputGeometry(160)))
    assert np.array_equal(build_cache(rows[:3], Path("nowhere"), tmp_path, InputGeometry(160)), cached)


def test_references_are_confirmed_and_not_of_the_test_fold(rows: list[LabelledImage]) -> None:
    found = choose_references(rows)
    assert len(found) == 4000
    assert all(row.fold != PLAN.test_fold and row.diagnosis_confirm_type for row in found)
    assert len({row.lesion for row in found} - excluded_lesions()) == len(found)
    assert {row.diagnosis for row in found} == set(TRAINED)


def test_pairs_of_one_lesion_are_told_from_those_of_two(make_row: Callable[..., LabelledImage]) -> None:
    rows = [make_row(i) for i in (2, 3, 4, 5)]
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1], [0, 1]], np.float32)
    found = pair_figures(vectors, [row.lesion for row in rows])
    assert (found["one lesion"]["0.5"], found["two lesions"]["0.5"]) == (0.8, 0.4)
    assert set(pair_figures(vectors[:2], ["a", "b"])) == {"two lesions"}

"""Views and clutter: the same for the same seed, at any size, and without what the image does not show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
import pytest

from data_jobs.training.augment import KINDS, augment, augment_outlined, in_field, round_field, soften, spoil
from data_jobs.training.recipe import read_recipe

PLAN = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml")).augment
NOISE = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
SKIN = (205, 160, 140)


def test_equal_seeds_give_equal_views() -> None:
    for options in ({}, {"cluttered": True}):
        views = [augment(NOISE, 96, PLAN, np.random.default_rng(seed), **options) for seed in (5, 5, 6)]
        assert (views[0].shape, views[0].dtype) == ((96, 96, 3), np.uint8)
        assert np.array_equal(views[0], views[1])
        assert not np.array_equal(views[0], views[2])


@pytest.mark.parametrize("cluttered", [False, True])
def test_a_mask_takes_no_part_in_the_view(*, cluttered: bool) -> None:
    mask = np.zeros((112, 112), np.uint8)
    alone, with_mask = (
        made(np.random.default_rng(9))
        for made in (
            lambda rng: augment(NOISE, 96, PLAN, rng, cluttered=cluttered),
            lambda rng: augment_outlined(NOISE, mask, 96, PLAN, rng, cluttered=cluttered)[0],
        )
    )
    assert np.array_equal(alone, with_mask)


def test_a_mask_lies_where_the_lesion_does() -> None:
    lesion = np.zeros((224, 224), np.uint8)
    lesion[40:120, 60:190] = 255
    image = np.where(lesion[..., None] > 0, 40, 220).astype(np.uint8).repeat(3, axis=2)
    for seed in range(12):
        view, mask = augment_outlined(image, lesion, 96, PLAN, np.random.default_rng(seed))
        dark, inside = view.mean(2) < view.mean(2).max() * 0.6, mask > 127
        assert (dark & inside).sum() > 0.93 * (dark | inside).sum()


def test_a_round_field_moves_a_mask_and_hides_what_is_outside() -> None:
    everything = Image.new("L", (112, 112), 255)
    lit, moved = Image.new("RGB", (224, 224), (255, 255, 255)), 0
    for seed in range(16):
        shown = round_field(lit, np.random.default_rng(seed))
        mask = np.asarray(in_field(everything, shown).resize(shown.size)) > 127
        box = shown.info["box"]
        moved += box != [0, 0, 224, 224]
        # Where the field is dark there is no lesion; a pale field cannot be told from the image here.
        if np.asarray(shown).min() < 30:
            bright = np.asarray(shown).min(2) > 127
            assert (bright & mask).sum() > 0.95 * (bright | mask).sum()
    assert moved
    assert in_field(everything, lit) is everything


def test_soft_views_lose_detail() -> None:
    assert soften(Image.fromarray(NOISE)).size == (84, 84)

    def detail(*, soft: bool) -> float:
        views = [augment(NOISE, 160, PLAN, np.random.default_rng(seed), soft=soft) for seed in range(4)]
        return float(np.mean([np.abs(np.diff(view.astype(float), axis=1)).mean() for view in views]))

    assert detail(soft=True) < 0.7 * detail(soft=False)


def test_a_plain_image_stays_plain() -> None:
    # No black corner, no seam: whatever the crop and turn, only image is seen.
    image = np.full((224, 224, 3), 128, np.uint8)
    for seed in range(20):
        view = augment(image, 96, PLAN, np.random.default_rng(seed))
        assert view.reshape(-1, 3).std(0).max() < 1.0


@pytest.mark.parametrize("size", [84, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_most_of_the_lesion_to_be_seen(kind: str, size: int) -> None:
    image = Image.new("RGB", (size, size), SKIN)
    middle = slice(round(0.35 * size), round(0.65 * size))
    covered = []
    for seed in range(8):
        first = np.asarray(KINDS[kind](image, np.random.default_rng(seed)))
        assert first.shape == (size, size, 3)
        changed = np.abs(first.astype(int) - SKIN).max(2) > 8
        covered.append(float(changed.mean()))
        assert changed[middle, middle].mean() < 0.6
    assert max(covered) > 0.01
    assert np.asarray(image).reshape(-1, 3).std(0).max() == 0.0, "the image given stays as it is"


def test_some_views_are_cast_grey_or_damaged_and_some_are_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(40, 200, (64, 64, 3)).astype(np.uint8)
    views = [spoil(pixels, np.random.default_rng(seed)) for seed in range(60)]
    grey = sum(np.ptp(view, axis=2).max() <= 8 for view in views)
    same = sum(np.array_equal(view, pixels) for view in views)
    assert 1 <= grey <= 15
    assert 15 <= same <= 45

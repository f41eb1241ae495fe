"""Clutter covers a part of any image, at any size, the same for the same seed."""

from __future__ import annotations

import numpy as np
from PIL import Image
import pytest

from data_jobs.training.clutter import KINDS, clutter, spoil

SKIN = (205, 160, 140)


@pytest.mark.parametrize("size", [84, 224])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_leaves_most_of_the_lesion_to_be_seen(kind: str, size: int) -> None:
    image = Image.new("RGB", (size, size), SKIN)
    middle = slice(round(0.35 * size), round(0.65 * size))
    covered = []
    for seed in range(12):
        first, again = (np.asarray(KINDS[kind](image, np.random.default_rng(seed))) for _ in range(2))
        assert np.array_equal(first, again)
        assert first.shape == (size, size, 3)
        changed = np.abs(first.astype(int) - SKIN).max(2) > 8
        covered.append(float(changed.mean()))
        assert changed[middle, middle].mean() < 0.6
    assert max(covered) > 0.01
    assert np.asarray(image).reshape(-1, 3).std(0).max() == 0.0, "the image given stays as it is"


def test_one_to_three_kinds_and_equal_seeds_give_equal_images() -> None:
    image = Image.new("RGB", (96, 96), SKIN)
    views = [np.asarray(clutter(image, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2])


def test_some_views_are_cast_grey_or_damaged_and_some_are_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(40, 200, (64, 64, 3)).astype(np.uint8)
    views = [spoil(pixels, np.random.default_rng(seed)) for seed in range(60)]
    grey = sum(np.ptp(view, axis=2).max() <= 8 for view in views)
    same = sum(np.array_equal(view, pixels) for view in views)
    assert 1 <= grey <= 15
    assert 15 <= same <= 45

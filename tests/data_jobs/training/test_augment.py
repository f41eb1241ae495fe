from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_jobs.training.augment import augment, soften
from data_jobs.training.recipe import read_recipe

PLAN = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite0.toml")).augment


def test_equal_seeds_give_equal_views() -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    first = augment(image, 128, PLAN, np.random.default_rng(5))
    again = augment(image, 128, PLAN, np.random.default_rng(5))
    other = augment(image, 128, PLAN, np.random.default_rng(6))
    assert first.shape == (128, 128, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_soft_views_lose_detail_and_cluttered_ones_are_covered() -> None:
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3)).astype(np.uint8)
    assert soften(Image.fromarray(image)).size == (84, 84)

    def detail(*, soft: bool) -> float:
        views = [augment(image, 160, PLAN, np.random.default_rng(seed), soft=soft) for seed in range(8)]
        return float(np.mean([np.abs(np.diff(view.astype(float), axis=1)).mean() for view in views]))

    assert detail(soft=True) < 0.7 * detail(soft=False)
    first, again = (augment(image, 96, PLAN, np.random.default_rng(3), cluttered=True) for _ in range(2))
    assert first.shape == (96, 96, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, augment(image, 96, PLAN, np.random.default_rng(3)))


def test_a_plain_image_stays_plain() -> None:
    # No black corner, no seam: whatever the crop and turn, only image is seen.
    image = np.full((224, 224, 3), 128, np.uint8)
    for seed in range(40):
        view = augment(image, 96, PLAN, np.random.default_rng(seed))
        assert view.reshape(-1, 3).std(0).max() < 1.0

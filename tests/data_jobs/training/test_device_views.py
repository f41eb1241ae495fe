"""Views made in batches on a device look as those made one by one with Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
import pytest
import torch

from data_jobs.training.augment import as_jpeg, augment, clutter, overlay
from data_jobs.training.device_views import DeviceViews, Overlays, blur, jpeg
from data_jobs.training.recipe import Stage, read_recipe

pytestmark = pytest.mark.torch

PLAN = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml")).augment
COUNT = 64


def lesions(count: int, side: int) -> np.ndarray:
    """Skin with a dark blot and some texture, uint8 N×side×side×3."""
    rng = np.random.default_rng(side)
    down, across = np.mgrid[:side, :side] / side
    made = []
    for _ in range(count):
        x, y, r = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6), rng.uniform(0.1, 0.3)
        blot = 1.0 / (1.0 + np.exp((np.hypot(across - x, down - y) - r) * 40.0))
        skin = np.array([205, 160, 140]) + rng.normal(0, 15, 3) - 90.0 * blot[..., None]
        made.append(skin + rng.normal(0, 8, (side, side, 1)) + rng.normal(0, 4, (side, side, 3)))
    return np.clip(made, 0, 255).astype(np.uint8)


def tensor(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float()


def pixels(views: torch.Tensor) -> np.ndarray:
    return views.permute(0, 2, 3, 1).numpy()


HOME, OTHER = lesions(COUNT, 192), lesions(COUNT, 84)


@pytest.fixture(scope="module")
def views() -> DeviceViews:
    sources = np.repeat([0, 1], COUNT)
    images = [torch.from_numpy(HOME), torch.from_numpy(OTHER)]
    return DeviceViews(images, sources, Overlays.drawn(128, 192, 3, workers=2), PLAN)


def test_equal_seeds_give_equal_views(views: DeviceViews) -> None:
    rows, stage = np.array([0, 5, COUNT + 2, 9]), Stage(96, 1, soft=0.5, clutter=0.5)
    first, again, other = (views.views(rows, 96, stage, np.random.default_rng(s)) for s in (1, 1, 2))
    assert first.shape == (4, 3, 96, 96)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, first.round().clamp(0, 255))


@pytest.mark.parametrize("quality", [8, 40, 75, 95])
@pytest.mark.parametrize("side", [84, 192])
def test_a_jpeg_is_pillows(quality: int, side: int) -> None:
    images = (OTHER if side == 84 else HOME)[:6]
    expected = np.stack([np.asarray(as_jpeg(Image.fromarray(image), quality)) for image in images])
    found = pixels(jpeg(tensor(images), np.full(len(images), quality)))
    damage = np.abs(expected.astype(float) - images).mean()
    assert np.abs(found - expected).mean() < min(1.5, 0.6 * damage)
    assert np.abs(found - images).mean() == pytest.approx(damage, rel=0.1)


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.2])
def test_a_blur_is_pillows(sigma: float) -> None:
    expected = np.stack(
        [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma))) for image in HOME[:4]]
    )
    assert np.abs(pixels(blur(tensor(HOME[:4]), torch.full((4,), sigma))) - expected).mean() < 1.2


def test_an_overlay_is_the_clutter_itself() -> None:
    shrunk = 0
    for seed in range(24):
        layer, box = overlay(192, np.random.default_rng(seed))
        overlays = Overlays(torch.from_numpy(layer)[None], torch.tensor([box]))
        found = pixels(overlays.over(tensor(HOME[:1]), torch.tensor([0])))[0]
        expected = np.asarray(clutter(Image.fromarray(HOME[0]), np.random.default_rng(seed)))
        # An image that was shrunk was resampled by another filter.
        shrunk += (small := box != [0.0, 0.0, 1.0, 1.0])
        assert np.abs(found - expected).mean() < (3.0 if small else 0.3)
    assert 0 < shrunk < 12


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("options", [{}, {"soft": 1.0}, {"clutter": 1.0}], ids=["plain", "soft", "clutter"])
def test_the_effect_is_that_of_the_views_made_one_by_one(
    views: DeviceViews, source: int, options: dict[str, float]
) -> None:
    """Brightness, spread within and between images, detail and share of very dark: what a network would learn from."""
    images = (HOME, OTHER)[source]
    soft = bool(options.get("soft")) and source == 0
    expected = np.stack(
        [
            augment(image, 96, PLAN, np.random.default_rng(i), soft=soft, cluttered="clutter" in options)
            for i, image in enumerate(np.concatenate([images] * 2))
        ]
    )
    rows = np.tile(np.arange(COUNT), 2) + source * COUNT
    found = pixels(views.views(rows, 96, Stage(96, 1, **options), np.random.default_rng(7)))

    def effect(made: np.ndarray) -> dict[str, float]:
        grey = made.astype(np.float32).mean(3)
        return {
            "mean": grey.mean(),
            "within": grey.std((1, 2)).mean(),
            "between": grey.mean((1, 2)).std(),
            "detail": np.abs(np.diff(grey, axis=2)).mean(),
            "colour": np.ptp(made.astype(np.float32).mean((1, 2)), axis=1).mean(),
        }

    wanted = effect(expected)
    assert effect(found) == pytest.approx(wanted, rel=0.2)
    assert effect(found)["mean"] == pytest.approx(wanted["mean"], rel=0.06)
    dark, near = ((made.mean(3) < 30).mean() for made in (expected, found))
    assert near == pytest.approx(dark, abs=0.05)


def test_a_plain_image_stays_plain() -> None:
    grey = torch.full((1, 192, 192, 3), 128, dtype=torch.uint8)
    none = Overlays.drawn(1, 192, 0)
    made = DeviceViews([grey], np.zeros(1, np.int64), none, PLAN).views(
        np.zeros(40, np.int64), 96, Stage(96, 1, soft=0.5), np.random.default_rng(0)
    )
    assert made.flatten(2).std(2).max() < 1.0

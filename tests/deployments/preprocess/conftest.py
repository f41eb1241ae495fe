"""Drawn images, and the bytes of them in every format."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
import pytest

from tests import images


@pytest.fixture(scope="session")
def lesion() -> Callable[[int, int], Image.Image]:
    """A drawing without any symmetry: a dark blotch on skin, off centre, with structure of a fixed relative size."""

    @cache
    def draw(width: int, height: int) -> Image.Image:
        scale = 2
        image = Image.new("RGB", (width * scale, height * scale), (224, 178, 158))
        pen = ImageDraw.Draw(image)
        w, h = image.size
        pen.ellipse((0.15 * w, 0.2 * h, 0.6 * w, 0.75 * h), fill=(110, 66, 48))
        pen.ellipse((0.25 * w, 0.3 * h, 0.45 * w, 0.5 * h), fill=(60, 34, 30))
        pen.rectangle((0.5 * w, 0.6 * h, 0.9 * w, 0.7 * h), fill=(180, 90, 80))
        for i in range(12):
            x = (0.05 + 0.075 * i) * w
            pen.line((x, 0.05 * h, x + 0.08 * w, 0.95 * h), fill=(40, 30, 25), width=max(1, w // 200))
        return image.resize((width, height), Image.Resampling.LANCZOS).filter(
            ImageFilter.GaussianBlur(width / 600)
        )

    return draw


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """`encode(image, "PNG", **options) -> bytes`."""
    return images.encode


@pytest.fixture(scope="session")
def difference() -> Callable[[Image.Image, Image.Image], float]:
    """The mean absolute difference of two images of one size, on the 0-255 scale."""

    def mean_absolute(a: Image.Image, b: Image.Image) -> float:
        assert a.size == b.size
        return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean())

    return mean_absolute

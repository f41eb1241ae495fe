"""Quality measures mean what they say, whatever camera took the image."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
import pytest

from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.preprocess import prepare_image
from deployments.preprocess.quality import measure_quality
from deployments.preprocess.resize import InputGeometry

SIDE = 192


def plain(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def test_plain_images():
    black, grey, white = (measure_quality(plain(value)) for value in (0, 128, 255))
    assert (black.exposure, black.dark, black.bright) == (0.0, 1.0, 0.0)
    assert (white.dark, white.bright) == (0.0, 1.0)
    assert white.exposure == pytest.approx(1.0)
    assert grey.exposure == pytest.approx(128 / 255)
    assert all(
        m.sharpness == pytest.approx(0.0, abs=1e-6) and m.contrast == pytest.approx(0.0, abs=1e-6)
        for m in (black, grey, white)
    )


def test_half_black_half_white():
    image = plain(0)
    image[:, SIDE // 2 :] = 255
    measures = measure_quality(image)
    assert measures.contrast == pytest.approx(0.5)
    assert (measures.dark, measures.bright) == (0.5, 0.5)


def test_sharpness_is_the_variance_of_the_laplacian():
    luma = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
    values = [
        float(luma[y - 1, x])
        + float(luma[y + 1, x])
        + float(luma[y, x - 1])
        + float(luma[y, x + 1])
        - 4.0 * float(luma[y, x])
        for y in range(1, 8)
        for x in range(1, 10)
    ]
    measured = measure_quality(np.repeat(luma[..., None], 3, axis=2)).sharpness
    assert measured == pytest.approx(np.var(values), rel=1e-4)


def test_blur_lowers_sharpness_step_by_step(lesion):
    image = lesion(SIDE, SIDE)
    measured = [
        measure_quality(np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))).sharpness
        for sigma in (0, 0.5, 1, 2, 4)
    ]
    assert measured == sorted(measured, reverse=True)
    assert measured[0] > 20 * measured[-1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sharpness_does_not_depend_on_the_camera(lesion, encode, kind):
    """The same drawing at 600 to 3,000 pixels: within a tenth."""
    options = {"quality": 92} if kind == "JPEG" else {"compress_level": 1}
    measured = [
        prepare_image(
            encode(lesion(width, width * 3 // 4), kind, **options), InputGeometry(SIDE), UploadLimits()
        ).quality
        for width in (600, 1200, 3000)
    ]
    sharpness = [m.sharpness for m in measured]
    assert max(sharpness) < 1.1 * min(sharpness), sharpness
    for name in ("exposure", "contrast"):
        values = [getattr(m, name) for m in measured]
        assert max(values) - min(values) < 0.01


def test_camera_originals_are_as_sharp_as_their_small_copies(isic_dir):
    """Real captures of 600 to 3,000 pixels against the archive's 320: nine of ten within a quarter."""
    ratios = []
    for path in sorted((isic_dir / "uploads").glob("*.jpg")):
        original, small = (
            prepare_image(p.read_bytes(), InputGeometry(SIDE), UploadLimits(min_side=100)).quality.sharpness
            for p in (path, isic_dir / "images" / path.name)
        )
        ratios.append(original / small)
    assert len(ratios) >= 20
    assert np.mean([0.75 < ratio < 1.25 for ratio in ratios]) >= 0.9


def test_the_smallest_image_can_be_measured():
    pixels = np.asarray(Image.new("RGB", (3, 3), (10, 20, 30)))
    assert measure_quality(pixels).sharpness == 0.0

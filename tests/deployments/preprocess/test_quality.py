"""Quality measures mean what they say, whatever camera took the image."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter
import pytest

from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import measure_quality, prepare_image

SIDE = 192


def plain(value: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), value, np.uint8)


def test_plain_images():
    black, grey, white = (measure_quality(plain(value)) for value in (0, 128, 255))
    assert (black.exposure, black.dark, black.bright) == (0.0, 1.0, 0.0)
    assert (white.dark, white.bright) == (0.0, 1.0)
    assert white.exposure == pytest.approx(1.0)
    assert grey.exposure == pytest.approx(128 / 255)
    for measured in (black, grey, white):
        assert (measured.sharpness, measured.contrast) == pytest.approx((0.0, 0.0), abs=1e-6)
    half = plain(0)
    half[:, SIDE // 2 :] = 255
    measured = measure_quality(half)
    assert (measured.contrast, measured.dark, measured.bright) == pytest.approx((0.5, 0.5, 0.5))


def test_red_and_blue_are_the_colour_balance_however_bright():
    skin = np.random.default_rng(0).integers(60, 120, (SIDE, SIDE, 3)).astype(np.uint8)
    plain_skin, brighter = measure_quality(skin), measure_quality(skin * 2)
    assert (plain_skin.red, plain_skin.blue) == pytest.approx((0.0, 0.0), abs=0.01)
    assert (brighter.red, brighter.blue) == pytest.approx((0.0, 0.0), abs=0.01)
    warm = np.clip(skin * np.array([1.2, 1.0, 0.8]), 0, 255).astype(np.uint8)
    measured = measure_quality(warm)
    assert (measured.red, measured.blue) == pytest.approx((np.log(1.2), np.log(0.8)), abs=0.02)
    assert (measure_quality(plain(0)).red, measure_quality(plain(0)).blue) == (0.0, 0.0)


def test_sharpness_is_the_variance_of_the_laplacian():
    luma = np.random.default_rng(0).integers(0, 256, (9, 11)).astype(np.uint8)
    around = ((-1, 0), (1, 0), (0, -1), (0, 1))
    values = [
        sum(float(luma[y + dy, x + dx]) for dy, dx in around) - 4.0 * float(luma[y, x])
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
        for width in (600, 3000)
    ]
    sharpness = [m.sharpness for m in measured]
    assert max(sharpness) < 1.1 * min(sharpness), sharpness
    for name in ("exposure", "contrast"):
        values = [getattr(m, name) for m in measured]
        assert max(values) - min(values) < 0.01


def test_colour_is_what_brightness_does_not_say(lesion, encode):
    picture = lesion(600, 450)
    grey = picture.convert("L")
    # Sepia, as an app's filter makes it.
    sepia = Image.merge(
        "RGB", [grey.point(lambda v, f=f: int(255 * (v / 255) ** f)) for f in (0.8, 1.0, 1.3)]
    )

    def colour(image: Image.Image, kind: str = "JPEG", **options: object) -> float:
        data = encode(image, kind, **options)
        return prepare_image(data, InputGeometry(SIDE), UploadLimits()).quality.colour

    assert colour(picture) > 4
    assert colour(grey) < 0.1
    assert colour(grey.convert("RGB"), quality=60) < 0.1
    assert colour(grey.convert("1"), "PNG") < 0.1
    assert colour(sepia, quality=90) < 2.4
    assert measure_quality(plain(128)).colour < 0.1


@pytest.mark.parametrize("side", [300, 1000])
def test_one_bit_is_known_however_it_is_stored(lesion, encode, side):
    def share(image: Image.Image) -> float:
        data = encode(image, "PNG", compress_level=1)
        return prepare_image(data, InputGeometry(SIDE), UploadLimits()).quality.two_levels

    picture = lesion(side, side)
    dithered = picture.convert("1")
    parted = picture.convert("L").point(lambda v: 255 * (v > 120), "1")
    brown = Image.merge("RGB", [parted.convert("L").point(lambda v, o=o: v // 2 + o) for o in (90, 60, 20)])
    for bits in (dithered, *(dithered.convert(mode) for mode in ("L", "RGB", "P")), parted, brown):
        assert share(bits) == 1.0, bits.mode
    assert share(Image.effect_noise((side, side), 40).convert("RGB")) < 0.1


def test_real_images_have_colours_and_many_levels_and_are_whole(isic_dir):
    """Every two hundredth of the archive; a model's `calibration.json` has the quantiles of a whole fold."""
    for path in sorted((isic_dir / "images").glob("*.jpg"))[::200]:
        quality = prepare_image(path.read_bytes(), InputGeometry(176), UploadLimits(min_side=100)).quality
        assert (quality.colour >= 2.4, quality.two_levels < 0.7, quality.damaged) == (True, True, 0.0), (
            path.name
        )

"""Augmentation: what a camera, a hand and an archive may do to an image without changing its diagnosis.

Aspect and resolution go with the diagnosis in this archive, so both are hidden: every draw
passes through a simulated capture of random resolution, softness and JPEG quality.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data_jobs.training.clutter import as_jpeg, clutter, spoil
from data_jobs.training.dataset import BCN84_SIDE
from data_jobs.training.plans import AugmentPlan

_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
BCN84_QUALITY = 75
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# Hue turns about the grey axis: YIQ's chroma plane, as linear maps on RGB.
_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=np.float64
)
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def augment(
    pixels: NDArray[np.uint8],
    side: int,
    plan: AugmentPlan,
    rng: np.random.Generator,
    *,
    soft: bool = False,
    cluttered: bool = False,
) -> NDArray[np.uint8]:
    """One random view of an image, uint8 H×H×3 to side×side×3; equal draws for equal `rng` states.

    `soft`: as if it had been archived at the other hospital's size; `cluttered`: with what must not count, in whole
    view half of the time.
    """
    area = rng.uniform(*plan.crop_area)
    image = Image.fromarray(pixels)
    if cluttered:
        image = clutter(image, rng)
        area = 1.0 if rng.random() < 0.5 else area
    if soft:
        image = soften(image)
    stretch = np.exp(rng.uniform(-1.0, 1.0) * np.log1p(plan.aspect_jitter) / 2.0)
    crop_x, crop_y = (min(1.0, float(np.sqrt(area) * f)) for f in (stretch, 1.0 / stretch))
    capture = _simulate_capture(image, side / float(np.sqrt(area)), plan, rng)
    view = _view(capture, side, (crop_x, crop_y), plan.small_rotation, rng)
    coloured = _colour(np.asarray(view), plan, rng)
    return spoil(coloured, rng) if cluttered else coloured


def soften(image: Image.Image) -> Image.Image:
    """Reduce an image as those of bcn84 were: to 84 by 84 pixels, as JPEG of quality 75 (by its quantization tables)."""
    small = image.resize((BCN84_SIDE, BCN84_SIDE), Image.Resampling.BICUBIC)
    return as_jpeg(small, BCN84_QUALITY)


def _simulate_capture(
    image: Image.Image, full_side: float, plan: AugmentPlan, rng: np.random.Generator
) -> Image.Image:
    """Resample to a random resolution, then soften and compress some of the time."""
    side = max(32, round(full_side * float(np.exp(rng.uniform(*np.log(plan.capture_scale))))))
    image = image.resize((side, side), _FILTERS[int(rng.integers(2))])
    if rng.random() < plan.blur_share:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*plan.blur_sigma)))
    if rng.random() < plan.jpeg_share:
        low, high = plan.jpeg_quality
        image = as_jpeg(image, int(rng.integers(low, high + 1)))
    return image


def _view(
    image: Image.Image,
    side: int,
    crop: tuple[float, float],
    small_rotation: float,
    rng: np.random.Generator,
) -> Image.Image:
    """Crop, mirror, turn and resample in one affine map; what lies outside is mirrored in."""
    size = image.width
    # A full-size crop turned by 20 degrees reaches 0.14 of the side beyond the edge.
    pad = math.ceil(0.16 * size)
    padded = Image.fromarray(np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="reflect"))
    angle = np.deg2rad(90.0 * int(rng.integers(4)) + rng.uniform(-small_rotation, small_rotation))
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    centre = [pad + size * (0.5 + rng.uniform(-0.5, 0.5) * (1.0 - share)) for share in crop]
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag([crop[0] * size / side, crop[1] * size / side]) @ turn @ np.diag([mirror, 1.0])
    offset = np.array(centre) - matrix @ np.array([side / 2.0, side / 2.0])
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    return padded.transform(
        (side, side), Image.Transform.AFFINE, data, resample=_FILTERS[int(rng.integers(2))]
    )


def _colour(pixels: NDArray[np.uint8], plan: AugmentPlan, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Brightness, contrast, saturation, hue and channel gains, as one linear map of RGB."""
    brightness = 1.0 + rng.uniform(-1.0, 1.0) * plan.brightness
    contrast = 1.0 + rng.uniform(-1.0, 1.0) * plan.contrast
    saturation = 1.0 + rng.uniform(-1.0, 1.0) * plan.saturation
    angle = 2.0 * np.pi * rng.uniform(-1.0, 1.0) * plan.hue
    gains = 1.0 + rng.uniform(-1.0, 1.0, 3) * plan.channel_gain
    cosine, sine = saturation * np.cos(angle), saturation * np.sin(angle)
    chroma = np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
    matrix = (np.diag(gains) @ _FROM_YIQ @ chroma @ _TO_YIQ * brightness * contrast).astype(np.float32)
    image = pixels.astype(np.float32)
    grey = float((image @ _LUMA).mean()) * brightness * (1.0 - contrast)
    return np.clip(image @ matrix.T + (grey + 0.5), 0.0, 255.0).astype(np.uint8)

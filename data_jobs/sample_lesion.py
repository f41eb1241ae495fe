"""A drawn lesion to try the service with: archive images are not ours to hand out.

It looks like dermoscopy (skin, a pigmented spot with an uneven border, a network, globules),
and is none. The same seed draws the same picture.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = (800, 600)
SEED = 20260

_SKIN = np.array([226.0, 182.0, 160.0])
_RIM = np.array([164.0, 106.0, 74.0])
_CORE = np.array([104.0, 62.0, 42.0])
_NETWORK = np.array([70.0, 40.0, 28.0])

Field = NDArray[np.float64]


def draw_lesion(*, size: tuple[int, int] = SIZE, seed: int = SEED) -> Image.Image:
    """Draw a lesion, RGB of `size` (width, height)."""
    random = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    skin = _SKIN + 10 * _clouds(random, size, 6)[..., None] + 5 * _clouds(random, size, 60)[..., None]
    inside, depth = _outline(random, x, y, size)
    pigment = _RIM + (_CORE - _RIM) * np.clip(depth * 1.3 + 0.35 * _clouds(random, size, 9), 0, 1)[..., None]
    mesh = _network(random, x, y, size) * np.clip(1.25 - depth, 0, 1)
    pigment += (_NETWORK - pigment) * (0.55 * mesh)[..., None]
    pigment += (_NETWORK - pigment) * (0.7 * _globules(random, x, y, depth))[..., None]
    picture = skin + (pigment - skin) * inside[..., None]
    # Polarised light falls off towards the rim of the contact plate.
    distance = np.hypot(x - width / 2, y - height / 2) / np.hypot(width / 2, height / 2)
    picture *= (1 - 0.16 * distance**2)[..., None]
    picture += random.normal(0, 2.5, picture.shape)
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def write_sample(path: Path) -> None:
    """Draw the lesion into a JPEG file."""
    draw_lesion().save(path, format="JPEG", quality=93, subsampling=0)


def _clouds(random: np.random.Generator, size: tuple[int, int], cells: int) -> Field:
    """Smooth noise of about `cells` cells across, zero mean and unit deviation."""
    coarse = random.normal(size=(max(2, cells * size[1] // size[0]), cells)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    field: Field = (smooth - smooth.mean()) / smooth.std()
    return field


def _outline(random: np.random.Generator, x: Field, y: Field, size: tuple[int, int]) -> tuple[Field, Field]:
    """How much each point is lesion (0 to 1), and how deep it lies (0 at the border, 1 in the middle)."""
    width, height = size
    dx, dy = (x - 0.52 * width) / 1.18, y - 0.5 * height
    angle, radius = np.arctan2(dy, dx), np.hypot(dx, dy)
    border = np.full_like(radius, 0.30 * height)
    for wave in range(2, 12):
        amplitude = 0.075 * height * random.normal() / wave
        border += amplitude * np.cos(wave * angle + random.uniform(0, 2 * np.pi))
    border += 0.012 * height * _clouds(random, size, 24)
    softness = 0.022 * height * (1 + 0.5 * np.cos(angle - 0.8))
    inside = 1 / (1 + np.exp(-(border - radius) / softness))
    return inside, np.clip(1 - radius / border, 0, 1)


def _network(random: np.random.Generator, x: Field, y: Field, size: tuple[int, int]) -> Field:
    """The pigment network: a honeycomb of dark lines, bent as skin bends it (0 to 1)."""
    bend = 0.012 * size[1]
    u, v = x + bend * _clouds(random, size, 12), y + bend * _clouds(random, size, 12)
    wavelength = 0.030 * size[1]
    directions = np.deg2rad([15.0, 75.0, 135.0])
    waves = sum(np.cos(2 * np.pi / wavelength * (np.cos(d) * u + np.sin(d) * v)) for d in directions)
    lines: Field = np.clip((0.35 - np.asarray(waves)) / 1.6, 0, 1)
    return lines


def _globules(random: np.random.Generator, x: Field, y: Field, depth: Field) -> Field:
    """A few dark, round globules off the middle (0 to 1)."""
    field = np.zeros_like(depth)
    candidates = np.argwhere((depth > 0.25) & (depth < 0.75))
    for row, column in candidates[random.choice(len(candidates), size=16, replace=False)]:
        size = random.uniform(4, 8)
        field = np.maximum(field, np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * size**2)))
    return field

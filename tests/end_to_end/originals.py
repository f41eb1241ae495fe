"""Originals as large as a camera's, drawn: they do not compress, and no two seeds give the same bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def draw_original(side: int, seed: int) -> bytes:
    """A square lesion under noise, as a PNG of three bytes a pixel."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    dark = np.exp(-4 * (x**2 + y**2))[..., None] * [110.0, 100.0, 95.0]
    pixels = np.array([220.0, 175.0, 155.0]) - dark + random.normal(0, 12, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()

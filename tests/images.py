"""Images as a file holds them."""

from __future__ import annotations

import io

from PIL import Image

from data_jobs.sample_lesion import draw_lesion


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def lesion_jpeg(seed: int = 1, size: tuple[int, int] = (400, 300)) -> bytes:
    """A drawn lesion as a camera would send it."""
    return encode(draw_lesion(size=size, seed=seed), "JPEG", quality=90)

"""The uploads of the golden vectors: drawn by code, so that no patient's and no archive's image is in them.

Each stands for something an app can get wrong. PNG, because decoders of JPEG differ in the
last bit. The same code draws the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
import io

import numpy as np
from PIL import Image, ImageDraw

from data_jobs.sample_lesion import draw_lesion

_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class GoldenUpload:
    """One upload: its name, what it tests, and the PNG file."""

    name: str
    tests: str
    png: bytes


def draw_uploads() -> list[GoldenUpload]:
    """All uploads, in the order of the document."""
    turned = Image.Exif()
    turned[_ORIENTATION] = 6
    return [
        GoldenUpload("landscape", "a lesion, wider than high: squashed to a square", _lesion((320, 240), 1)),
        GoldenUpload("portrait", "a lesion, higher than wide", _lesion((232, 310), 2)),
        GoldenUpload("square", "a lesion, already square", _lesion((256, 256), 3)),
        GoldenUpload("turned", "EXIF orientation 6: turned a quarter right before anything else",
                     _png(draw_lesion(size=(300, 226), seed=4), exif=turned.tobytes())),
        GoldenUpload("large", "over twice the input side: reduced by a whole factor before the resize", _large()),
        GoldenUpload("transparent", "a clear corner: laid on white", _transparent()),
        GoldenUpload("skin", "skin without a lesion", _png(_skin())),
        GoldenUpload("page", "not skin at all: p(UNK) must be high", _png(_page())),
    ]  # fmt: skip


def _png(image: Image.Image, exif: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **({} if exif is None else {"exif": exif}))
    return buffer.getvalue()


def _lesion(size: tuple[int, int], seed: int) -> bytes:
    return _png(draw_lesion(size=size, seed=seed))


def _large() -> bytes:
    """A small drawing in blocks of four pixels, so that the PNG stays small."""
    return _png(draw_lesion(size=(250, 196), seed=5).resize((1000, 784), Image.Resampling.NEAREST))


def _transparent() -> bytes:
    image = draw_lesion(size=(260, 230), seed=6).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    ImageDraw.Draw(alpha).polygon([(0, 0), (90, 0), (0, 90)], fill=0)
    image.putalpha(alpha)
    return _png(image)


def _skin() -> Image.Image:
    random = np.random.default_rng(7)
    grain = random.normal(0.0, 2.0, (240, 240, 1))
    return Image.fromarray(np.clip(np.array([214.0, 172.0, 150.0]) + grain, 0, 255).astype(np.uint8))


def _page() -> Image.Image:
    """Lines of dark bars on white, like a printed page."""
    random = np.random.default_rng(8)
    image = Image.new("RGB", (300, 400), (250, 250, 248))
    draw = ImageDraw.Draw(image)
    for top in range(24, 380, 14):
        left = 20
        while left < 270:
            width = int(random.integers(8, 40))
            draw.rectangle((left, top, min(left + width, 280), top + 6), fill=(30, 30, 34))
            left += width + 7
    return image

"""Archive files brought into another shape before they are sent, as somebody else might have done it."""

from __future__ import annotations

from collections.abc import Callable
import io
import math

from PIL import Image, ImageOps

#: Square files of the archive: side in pixels, and the JPEG quality of Pillow with the same quantization
#: tables (read from 60 files a side). Those of 256 pixels, quality 75, are 3 % of them, from one source, and left out.
SQUARE_FILES = {180: 95, 224: 95, 320: 90}


def reshaped(data: bytes, way: str) -> bytes:
    """A JPEG of another shape from a JPEG's bytes. Raises KeyError for a way that is not in WAYS."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    side = nearest_square(*image.size)
    buffer = io.BytesIO()
    WAYS[way](image, side).save(buffer, "JPEG", quality=SQUARE_FILES[side])
    return buffer.getvalue()


def nearest_square(width: int, height: int) -> int:
    """The archive's square file whose number of pixels is nearest."""
    return min(SQUARE_FILES, key=lambda side: abs(side - math.sqrt(width * height)))


def _squash(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _save_again(image: Image.Image, _side: int) -> Image.Image:
    return image


def _letterbox(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, color=(0, 0, 0))


def _crop(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)


#: "saved again" changes no shape: it tells how much of the difference is the second JPEG.
WAYS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "squashed": _squash,
    "saved again": _save_again,
    "letter-boxed": _letterbox,
    "cropped": _crop,
}

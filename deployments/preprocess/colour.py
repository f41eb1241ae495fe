"""From any mode that a JPEG or PNG decodes to, to RGB, in little more memory than the image itself."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Modes that Image.reduce averages; the others are indices, bits or words of two bytes.
_REDUCIBLE = frozenset({"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"})
_ALPHA = frozenset({"RGBA", "LA", "PA"})
_WHITE = (255, 255, 255, 255)


def reduce_to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Average blocks of factor x factor pixels and convert to RGB; always a new image.

    Transparency is laid on white, as a viewer shows it. A grey of 16 bits keeps its high
    byte. Reducing comes before compositing, so that a 40-megapixel image is never held in
    more than its own mode and one copy.
    """
    plain = _averageable(image)
    if factor > 1:
        plain = plain.reduce(factor)
    if plain.mode in _ALPHA or "transparency" in plain.info:
        rgba = plain.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    if plain.mode != "RGB":
        return plain.convert("RGB")
    # A copy leaves the file's own object, and the metadata that hangs on it, behind.
    return plain.copy() if plain is image else plain


def _averageable(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _high_byte(image)
    if image.mode in _REDUCIBLE and not (image.mode in {"L", "RGB"} and "transparency" in image.info):
        return image
    if image.mode in {"PA", "RGBa", "La"} or "transparency" in image.info:
        # A palette's or colour key's transparency has to be looked up before pixels are averaged.
        return image.convert("RGBA")
    return image.convert("L" if image.mode == "1" else "RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8; Pillow's own conversion clips at 255 instead. A colour key becomes white."""
    words = np.asarray(image)
    grey = (np.clip(words, 0, 0xFFFF) >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[words == key] = 255
    return Image.fromarray(grey)

"""From any mode that a JPEG or PNG decodes to, to sRGB, in little more memory than the image itself."""

from __future__ import annotations

from functools import lru_cache
import io

import numpy as np
from PIL import Image, ImageCms

from deployments.preprocess.structure import MAX_PROFILE

# Modes that Image.reduce averages; the others are indices, bits or words of two bytes.
_REDUCIBLE = frozenset({"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"})
_ALPHA = frozenset({"RGBA", "LA", "PA"})
_WHITE = (255, 255, 255, 255)
#: Pillow's modes, and the colour space of an ICC profile that fits each (ICC.1:2022, table 19).
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_SAMPLE_SIDE = 256


def reduce_to_rgb(image: Image.Image, factor: int, profile: bytes | None = None) -> Image.Image:
    """Average blocks of factor x factor pixels and convert to sRGB; always a new image.

    Transparency is laid on white, as a viewer shows it. A grey of 16 bits keeps its high
    byte. A profile that is broken or fits other pixels is ignored. Reducing comes before compositing, so that a 40-megapixel image is never held in
    more than its own mode and one copy.
    """
    plain = _averageable(image)
    if factor > 1:
        plain = plain.reduce(factor)
    if plain.mode in _ALPHA or "transparency" in plain.info:
        rgba = plain.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
    transform = _to_srgb(profile, plain.mode) if profile and len(profile) <= MAX_PROFILE else None
    if transform is not None:
        return transform.apply(plain)
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


@lru_cache(maxsize=8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings pixels of a mode from a profile to sRGB; None where there is nothing to do, or no way."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "RGB":
            return transform
        # Most profiles say sRGB: their pixels stay as they are.
        steps = np.linspace(0, 255, 6).astype(np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(36, 6, 3)
        changed = np.asarray(transform.apply(Image.fromarray(colours))).astype(int)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, MemoryError):
        return None
    return transform if np.abs(changed - colours).max() > 2 else None


def two_level_share(image: Image.Image) -> float:
    """The share of pixels that have one of the two most frequent levels of brightness: 1 for one bit."""
    sides = min(image.width, _SAMPLE_SIDE), min(image.height, _SAMPLE_SIDE)
    # Pixels are picked, not averaged: dots of black and white must not become grey.
    sample = _averageable(image.resize(sides, Image.Resampling.NEAREST)).convert("L")
    return sum(sorted(sample.histogram())[-2:]) / (sides[0] * sides[1])

"""Decoded pixels made those that a model expects: colours to sRGB, upright, at the model's geometry."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
import io
import struct
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from deployments.preprocess.structure import MAX_PROFILE
from model_store.manifest import InputSpec
from serve_app.domain.errors import ModelContractError

# Modes that Image.reduce averages; the others are indices, bits or words of two bytes.
_REDUCIBLE = frozenset({"L", "LA", "RGB", "RGBA", "CMYK", "YCbCr"})
_ALPHA = frozenset({"RGBA", "LA", "PA"})
_WHITE = (255, 255, 255, 255)
#: Pillow's modes, and the colour space of an ICC profile that fits each (ICC.1:2022, table 19).
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}
_SAMPLE_SIDE = 256


def reduce_to_rgb(image: Image.Image, factor: int, profile: bytes | None = None) -> Image.Image:
    """Average blocks of factor x factor pixels and convert to sRGB; never the file's own image.

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
    return plain.copy() if isinstance(plain, ImageFile.ImageFile) else plain


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


#: Left, top, right and bottom of the picture in its pixels; whole numbers unless it was reduced.
Extent = tuple[float, float, float, float]

_TAG = 0x0112
# EXIF 2.32, table 4: what undoes each orientation. 5 to 8 swap width and height.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MIRRORS_X = frozenset({2, 3, 7, 8})  # of the stored frame: its right edge comes first
_MIRRORS_Y = frozenset({3, 4, 6, 7})
_TURNS = frozenset({5, 6, 7, 8})

_METADATA_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    TypeError,
    struct.error,
)


def read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; 1 where there is none or it cannot be read.

    EXIF alone, as browsers follow it: Pillow's `getexif` would take XMP's orientation where EXIF has none, and
    the clinician saw that image unturned. Broken metadata is no reason to turn a good photograph away.
    """
    tags = Image.Exif()
    try:
        tags.load(image.info.get("exif", b""))
        value = tags.get(_TAG, 1)
    except _METADATA_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def is_turned(orientation: int) -> bool:
    """Whether width and height swap."""
    return orientation in _TURNS


def make_upright(image: Image.Image, extent: Extent, orientation: int) -> tuple[Image.Image, Extent]:
    """Turn and mirror pixels and extent together."""
    if orientation not in _UPRIGHT:
        return image, extent
    width, height = image.size
    left, top, right, bottom = extent
    if orientation in _MIRRORS_X:
        left, right = width - right, width - left
    if orientation in _MIRRORS_Y:
        top, bottom = height - bottom, height - top
    turned = (top, left, bottom, right) if orientation in _TURNS else (left, top, right, bottom)
    return image.transpose(_UPRIGHT[orientation]), turned


# Changed whenever the pixels that come out for the same bytes may change.
# 2: ICC profiles are applied, and an orientation in XMP is not.
PREPROCESS_VERSION = "2"

Interpolation = Literal["bilinear", "bicubic"]

_INTERPOLATIONS: dict[str, Interpolation] = {"bilinear": "bilinear", "bicubic": "bicubic"}
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True, slots=True)
class InputGeometry:
    """How an image of any shape becomes a model input (names as in timm's pretrained_cfg).

    aspect "squash" scales both sides to `side` whatever the shape: two thirds of the training
    archive arrive already squashed, and which ones goes with the diagnosis, so a model must
    not be able to see the aspect.
    """

    side: int
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    aspect: Literal["squash"] = "squash"

    @classmethod
    def from_manifest(cls, spec: InputSpec) -> Self:
        """Check a manifest's words. Raises ModelContractError for geometry this code cannot do."""
        side = spec.input_size[1]
        interpolation = _INTERPOLATIONS.get(spec.interpolation)
        if interpolation is None or spec.aspect != "squash" or not 0.0 < spec.crop_pct <= 1.0 or side < 32:
            raise ModelContractError(
                f"Preprocessing {PREPROCESS_VERSION} cannot do {side} px, {spec.interpolation}, "
                f"crop_pct {spec.crop_pct}, aspect {spec.aspect}."
            )
        return cls(side, interpolation, spec.crop_pct)


def resize_to_input(
    image: Image.Image, geometry: InputGeometry, extent: Extent | None = None
) -> NDArray[np.uint8]:
    """Resize what lies in `extent` (else all) of an RGB image with antialiasing; uint8, side×side×3."""
    left, top, right, bottom = extent or (0.0, 0.0, *image.size)
    inset_x = (right - left) * (1.0 - geometry.crop_pct) / 2.0
    inset_y = (bottom - top) * (1.0 - geometry.crop_pct) / 2.0
    resized = image.resize(
        (geometry.side, geometry.side),
        _FILTERS[geometry.interpolation],
        box=(left + inset_x, top + inset_y, right - inset_x, bottom - inset_y),
    )
    return np.asarray(resized, dtype=np.uint8)

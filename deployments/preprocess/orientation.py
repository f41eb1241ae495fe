"""EXIF orientation: how the camera was held, and what makes its image upright."""

from __future__ import annotations

import struct

from PIL import Image

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

"""Decoding of untrusted image bytes, bounded before a pixel is allocated.

The same functions serve training, the reference job and the online path.
"""

from __future__ import annotations

from dataclasses import dataclass
import io
import struct
from typing import Literal
import warnings

from PIL import Image, ImageFile

from deployments.preprocess.colour import reduce_to_rgb
from serve_app.domain.errors import (
    ImageTooSmall,
    TooLarge,
    UndecodableImage,
    UnsupportedImage,
)

ImageFile.LOAD_TRUNCATED_IMAGES = False
# Our own limit is checked on the header; Pillow's would only warn up to twice its value.
Image.MAX_IMAGE_PIXELS = None

ContentType = Literal["image/jpeg", "image/png"]

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

# EXIF 2.32, table 4: what undoes each orientation. 5 to 8 swap width and height.
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = frozenset({5, 6, 7, 8})

# What Pillow's own OSS-Fuzz harness accepts from a decoder (Tests/oss-fuzz/test_fuzzers.py).
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_METADATA_ERRORS = (*_DECODER_ERRORS, ArithmeticError, AttributeError, LookupError, TypeError)


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """What an upload may be; sizes in bytes and pixels."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 40_000_000
    min_side: int = 224


def sniff_content_type(data: bytes) -> ContentType:
    """Name the format by its magic bytes, whatever the file's name says.

    Raises UnsupportedImage for anything but JPEG and PNG.
    """
    if data.startswith(_JPEG_MAGIC):
        return "image/jpeg"
    if data.startswith(_PNG_MAGIC):
        return "image/png"
    raise UnsupportedImage


def decode_image(data: bytes, limits: UploadLimits, *, target_side: int | None = None) -> Image.Image:
    """Decode to an upright RGB image, orientation applied and metadata dropped.

    With `target_side`, a large image is reduced by a whole factor, never below twice the
    target: a JPEG while it is decoded (DCT scaling), anything else by a box filter right
    after. Either costs a fraction of full size in time and memory, and the antialiased
    resize that follows sees no aliasing.

    The image's `info["original_size"]` is its upright (width, height) before any scaling.
    Raises TooLarge, UnsupportedImage, ImageTooSmall or UndecodableImage.
    """
    content_type = sniff_content_type(data)
    if len(data) > limits.max_bytes:
        raise TooLarge(f"The image has {len(data)} bytes; the limit is {limits.max_bytes}.")
    formats = ("JPEG",) if content_type == "image/jpeg" else ("PNG",)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except _DECODER_ERRORS as error:
            raise UndecodableImage from error
        width, height = image.size
        if width * height > limits.max_pixels:
            raise TooLarge(f"The image has {width}x{height} pixels; the limit is {limits.max_pixels}.")
        if min(width, height) < limits.min_side:
            raise ImageTooSmall(
                f"The image is {width}x{height}; its short side must be at least {limits.min_side} pixels."
            )
        try:
            if target_side is not None:
                image.draft("RGB", (2 * target_side, 2 * target_side))
            image.load()
            orientation = _orientation(image)
            rgb = reduce_to_rgb(image, target_side)
            if orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
        except _DECODER_ERRORS as error:
            raise UndecodableImage from error
    turned = orientation in _TURNED
    rgb.info = {"original_size": (height, width) if turned else (width, height)}
    return rgb


def _orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, 1 to 8; 1 where there is none or it cannot be read.

    Broken metadata is no reason to turn a good photograph away.
    """
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _METADATA_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1

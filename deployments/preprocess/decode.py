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
from deployments.preprocess.orientation import Extent, is_turned, make_upright, read_orientation
from deployments.preprocess.structure import bound_structure
from serve_app.domain.errors import (
    ImageTooSmall,
    TooLarge,
    UndecodableImage,
    UnsupportedImage,
)

ImageFile.LOAD_TRUNCATED_IMAGES = False
# Our own limit is checked on the header; Pillow's would only warn up to twice its value.
Image.MAX_IMAGE_PIXELS = None
# Broken metadata is no reason to turn a good photograph away, nor to write of it to the log. Once for the process:
# `warnings.catch_warnings` around a decode would change, and put back, what every other thread goes by.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

ContentType = Literal["image/jpeg", "image/png"]

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

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


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An upright RGB image without metadata; width and height are the upload's, upright.

    A reduced image's last row and column may stand for fewer pixels than the others: `extent`
    is where the picture ends in them.
    """

    image: Image.Image
    width: int
    height: int
    extent: Extent


def decode_image(data: bytes, limits: UploadLimits, *, target_side: int | None = None) -> DecodedImage:
    """Decode to an upright RGB image, orientation applied and metadata dropped.

    With `target_side`, a large image is reduced by a whole factor, never below twice the
    target: a JPEG while it is decoded (DCT scaling), anything else by a box filter right
    after. Either costs a fraction of full size in time and memory, and the antialiased
    resize that follows sees no aliasing.

    Raises TooLarge, UnsupportedImage, ImageTooSmall or UndecodableImage.
    """
    content_type = sniff_content_type(data)
    if len(data) > limits.max_bytes:
        raise TooLarge(f"The image has {len(data)} bytes; the limit is {limits.max_bytes}.")
    bound_structure(data)
    formats = ("JPEG",) if content_type == "image/jpeg" else ("PNG",)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except _DECODER_ERRORS as error:
        raise UndecodableImage from error
    _check_size(image.size, limits)
    try:
        return _load(image, target_side)
    except _DECODER_ERRORS as error:
        raise UndecodableImage from error


def _check_size(size: tuple[int, int], limits: UploadLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise TooLarge(f"The image has {width}x{height} pixels; the limit is {limits.max_pixels}.")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(
            f"The image is {width}x{height}; its short side must be at least {limits.min_side} pixels."
        )


def _load(image: ImageFile.ImageFile, target_side: int | None) -> DecodedImage:
    width, height = image.size
    drafted = image.draft("RGB", (2 * target_side, 2 * target_side)) if target_side is not None else None
    _, (_, _, right, bottom) = drafted or (None, (0, 0, width, height))
    image.load()
    orientation = read_orientation(image)
    factor = max(1, min(image.size) // (2 * target_side)) if target_side is not None else 1
    upright, extent = make_upright(
        reduce_to_rgb(image, factor), (0.0, 0.0, right / factor, bottom / factor), orientation
    )
    if is_turned(orientation):
        width, height = height, width
    upright.info = {}
    return DecodedImage(upright, width, height, extent)

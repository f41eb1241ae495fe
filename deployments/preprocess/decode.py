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

from deployments.preprocess.jpeg import read_jpeg, require_supported
from deployments.preprocess.pixels import (
    Extent,
    is_turned,
    make_upright,
    read_orientation,
    reduce_to_rgb,
    two_level_share,
)
from deployments.preprocess.structure import read_jpeg_structure, read_png_structure
from serve_app.domain.errors import ImageTooSmall, TooLarge, UndecodableImage, UnsupportedImage

ImageFile.LOAD_TRUNCATED_IMAGES = False
# Our own limit is checked on the header; Pillow's would only warn up to twice its value.
Image.MAX_IMAGE_PIXELS = None
# Broken metadata is no reason to turn a good photograph away, nor to write of it to the log. Once for the process:
# `warnings.catch_warnings` around a decode would change, and put back, what every other thread goes by.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

ContentType = Literal["image/jpeg", "image/png"]

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Formats that are sent by mistake: where their magic bytes are, which, and the name.
_OTHER_FORMATS = (
    *((0, magic, "GIF") for magic in (b"GIF87a", b"GIF89a")),
    *((0, magic, "TIFF") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
    *(
        (4, b"ftyp" + brand, "HEIC")
        for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
    ),
    *((4, b"ftyp" + brand, "AVIF") for brand in (b"avif", b"avis")),
    *((0, magic, "JPEG 2000") for magic in (b"\0\0\0\x0cjP  ", b"\xffO\xffQ")),
    *((0, magic, "JPEG XL") for magic in (b"\0\0\0\x0cJXL ", b"\xff\n")),
    *((0, magic, "ZIP") for magic in (b"PK\3\4", b"PK\5\6")),
    (8, b"WEBP", "WebP"),
    (128, b"DICM", "DICOM"),
    (0, b"BM", "BMP"),
    (0, b"%PDF-", "PDF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"II\xbc", "JPEG XR"),
    (4, b"ftyp", "a video or an image in an MPEG-4 container"),
    (0, b"<svg", "SVG"),
    (0, b"<?xml", "XML"),
)
#: The share of a damaged picture that may be missing; more is no picture. Judgement: a strip at the rim.
MAX_MISSING = 0.05

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

    Raises UnsupportedImage for anything but JPEG and PNG, with the name of what was found.
    """
    if data.startswith(_JPEG_MAGIC):
        return "image/jpeg"
    if data.startswith(_PNG_MAGIC):
        return "image/png"
    for at, magic, name in _OTHER_FORMATS:
        if data.startswith(magic, at):
            raise UnsupportedImage(f"The content is {name}; only JPEG and PNG are accepted.")
    raise UnsupportedImage


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An upright RGB image without metadata; width and height are the upload's, upright.

    A reduced image's last row and column may stand for fewer pixels than the others: `extent`
    is where the picture ends in them. `missing` is the share of the picture that a damaged file
    lacks (see `read_jpeg`), `two_levels` the share of pixels in the two most frequent levels of brightness.
    """

    image: Image.Image
    width: int
    height: int
    extent: Extent
    missing: float
    two_levels: float


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
    try:
        if content_type == "image/jpeg":
            return _decode_jpeg(data, limits, target_side)
        return _decode_png(data, limits, target_side)
    except _DECODER_ERRORS as error:
        raise UndecodableImage from error


def _decode_jpeg(data: bytes, limits: UploadLimits, target_side: int | None) -> DecodedImage:
    structure = read_jpeg_structure(data)
    require_supported(structure)
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    size = image.size
    _check_size(size, limits)
    drafted = image.draft("RGB", (2 * target_side, 2 * target_side)) if target_side is not None else None
    _, (_, _, right, bottom) = drafted or (None, (0, 0, *size))
    pixels, missing = read_jpeg(image, data, structure)
    if missing > MAX_MISSING:
        raise UndecodableImage(
            "The JPEG file is damaged: "
            + (
                f"about {missing:.0%} of the picture is missing."
                if missing < 1
                else "too little of it is there."
            )
        )
    profile = image.info.get("icc_profile")
    return _finish(pixels, size, (right, bottom), read_orientation(image), profile, missing, target_side)


def _decode_png(data: bytes, limits: UploadLimits, target_side: int | None) -> DecodedImage:
    seen, profile = read_png_structure(data)
    image = Image.open(io.BytesIO(seen), formats=("PNG",))
    _check_size(image.size, limits)
    image.load()
    return _finish(image, image.size, image.size, read_orientation(image), profile, 0.0, target_side)


def _check_size(size: tuple[int, int], limits: UploadLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise TooLarge(f"The image has {width}x{height} pixels; the limit is {limits.max_pixels}.")
    if min(width, height) < limits.min_side:
        raise ImageTooSmall(
            f"The image is {width}x{height}; its short side must be at least {limits.min_side} pixels."
        )


def _finish(
    pixels: Image.Image,
    size: tuple[int, int],
    drafted: tuple[float, float],
    orientation: int,
    profile: bytes | None,
    missing: float,
    target_side: int | None,
) -> DecodedImage:
    """Reduce, bring to sRGB and turn; `size` is the file's, `drafted` where the picture ends in `pixels`."""
    two_levels = two_level_share(pixels)
    factor = max(1, min(pixels.size) // (2 * target_side)) if target_side is not None else 1
    extent = (0.0, 0.0, drafted[0] / factor, drafted[1] / factor)
    upright, extent = make_upright(reduce_to_rgb(pixels, factor, profile), extent, orientation)
    width, height = reversed(size) if is_turned(orientation) else size
    upright.info = {}
    return DecodedImage(upright, width, height, extent, missing, two_levels)

"""Decoding of JPEGs, and how much of a damaged one is missing.

libjpeg pads what is missing with grey and goes on; it only warns, and Pillow does not pass its warnings on.
simplejpeg does, and gives the same pixels, as it is built on the same library.
"""

from __future__ import annotations

from collections.abc import Sequence
import re

import numpy as np
from PIL import Image, ImageFile
import simplejpeg

from deployments.preprocess.structure import JpegStructure
from serve_app.domain.errors import UnsupportedImage

#: Of a damaged file of which nothing can be seen to be missing: blocks may be shifted or have false colours.
LEAST_MISSING = 0.001

_COLOURS = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
#: Of simplejpeg: libjpeg's errors and warnings, a chroma subsampling that it has no name for, or no memory.
_COMPLAINTS = (ValueError, KeyError, MemoryError)
#: What libjpeg calls damage: data that end too early, are left over, are no codes, or lack a restart marker; scans
#: in an order that cannot be.
_DAMAGE = re.compile(r"Corrupt JPEG data: (?:(\d+) extraneous bytes)?|Inconsistent progression")
# ITU-T T.81, table B.1, and T.87.
_UNSUPPORTED = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "Lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "Hierarchical JPEG"),
    0xF7: "JPEG-LS",
}


def require_supported(structure: JpegStructure) -> None:
    """Raise UnsupportedImage, by name, for a valid kind of JPEG that is not decoded here."""
    kind = _UNSUPPORTED.get(structure.process)
    if kind is None and structure.frame and structure.frame[0] in {12, 16}:
        kind = f"{structure.frame[0]}-bit JPEG"
    if kind is not None:
        raise UnsupportedImage(f"{kind} is not supported; send an 8-bit JPEG or a PNG.")


def read_jpeg(image: ImageFile.ImageFile, data: bytes, structure: JpegStructure) -> tuple[Image.Image, float]:
    """Decode at the size that `image` was drafted to; the pixels, and the share of them that is missing.

    The share is 0 for a whole file, at least LEAST_MISSING for a damaged one, and 1 where what was sent
    of a progressive file shows no detail. Raises what Pillow raises.
    """
    colours = _COLOURS.get(image.mode)
    if colours is not None and _is_sent(structure, structure.scans, finely=True):
        try:
            size = simplejpeg.decode_jpeg_header(data, image.height, image.width)[:2]
            if size == (image.height, image.width):
                pixels = simplejpeg.decode_jpeg(
                    data, colours, min_height=image.height, min_width=image.width, strict=True
                )
                # Pillow knows which CMYK is stored inverted.
                return (image if colours == "CMYK" else _image(pixels)), 0.0
        except _COMPLAINTS:
            pass  # a warning of libjpeg's, or a kind of file that only Pillow takes: seen to below
    image.load()
    return image, _missing(image, data, structure)


def _image(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _missing(image: Image.Image, data: bytes, structure: JpegStructure) -> float:
    """How much of a file is missing that libjpeg warned of or that lacks scans; 0 for a harmless warning."""
    damage = _DAMAGE.match(_warning(data, structure, image.mode))
    if damage is None and _is_sent(structure, structure.scans, finely=True):
        return 0.0
    # The scan in which the data end is the last one.
    sent = structure.scans[:-1] if damage is not None and len(structure.scans) > 1 else structure.scans
    if not _is_sent(structure, sent, finely=False):
        return 1.0
    # A block without data is of medium grey in every channel, 127 where the channel is stored inverted.
    pixels = np.asarray(image)
    grey = (pixels == 127) | (pixels == 128)
    share = float((grey if grey.ndim == 2 else grey.all(axis=2)).mean())
    left_over = int(damage[1] or 0) / len(data) if damage is not None else 0.0
    return max(share, left_over, LEAST_MISSING)


def _warning(data: bytes, structure: JpegStructure, mode: str) -> str:
    """The first warning about the picture itself: metadata are left out, whose faults would hide it."""
    bare = data[:2] + b"".join(structure.tables) + data[structure.first_scan :]
    colours = "CMYK" if mode == "CMYK" else "GRAY"
    try:
        simplejpeg.decode_jpeg(bare, colours, min_height=1, min_width=1, strict=True)
    except _COMPLAINTS as warning:
        return str(warning)
    return ""


def _is_sent(structure: JpegStructure, scans: Sequence[bytes], *, finely: bool) -> bool:
    """Whether the scans hold every coefficient of every component to the last bit.

    Not `finely`: the mean of every block, and some precision of the detail of the first component, which is
    luma. True for what cannot be read, which is for the decoder to refuse.
    """
    frame = structure.frame
    components = [frame[at] for at in range(6, len(frame) - 2, 3)]
    progressive = structure.process in {0xC2, 0xC6, 0xCA, 0xCE}
    # For each component and coefficient the bits that have not been sent; 255 is none sent (T.81, B.2.3).
    unsent = {component: np.full(64, 255, np.uint8) for component in components}
    for scan in scans:
        count = scan[0] if scan else 0
        if len(scan) < 4 + 2 * count:
            return True
        first, last, bits = scan[1 + 2 * count : 4 + 2 * count] if progressive else (0, 63, 0)
        for component in scan[1 : 1 + 2 * count : 2]:
            if component in unsent:
                unsent[component][first : last + 1] = bits & 0x0F
    if finely:
        return not any(left.any() for left in unsent.values())
    means = all(left[0] < 255 for left in unsent.values())
    return means and (not components or bool((unsent[components[0]] < 255).all()))

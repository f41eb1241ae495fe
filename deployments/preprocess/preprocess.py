"""Image quality, measured at the model's input size.

Measuring there makes the figures independent of the camera's resolution: a 12-megapixel
upload and its 600-pixel copy get the same sharpness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.preprocess.decode import ContentType, UploadLimits, decode_image, sniff_content_type
from deployments.preprocess.pixels import PREPROCESS_VERSION, InputGeometry, resize_to_input
from model_store.manifest import InputSpec
from serve_app.domain.assessment import QualityMeasures
from serve_app.domain.errors import RejectedUpload

# Rec. 601 luma, the weights JPEG itself uses.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_DARK = 13.0  # 5 % of full scale
_BRIGHT = 242.0  # 95 % of full scale


def measure_quality(
    pixels: NDArray[np.uint8], *, two_levels: float = 0.0, damaged: float = 0.0
) -> QualityMeasures:
    """Measure an image, uint8 H×W×3, at the model's input size; the last two are known from decoding its file."""
    channels = pixels.astype(np.float32)
    luma = channels @ _LUMA
    mean, deviation = luma.mean(), luma.std()
    red, green, blue = np.log(channels.mean((0, 1)) + 1.0)
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1]
    laplacian += luma[1:-1, :-2]
    laplacian += luma[1:-1, 2:]
    laplacian -= 4.0 * luma[1:-1, 1:-1]
    return QualityMeasures(
        sharpness=float(laplacian.var()),
        exposure=float(mean / 255.0),
        contrast=float(deviation / 255.0),
        dark=float(np.count_nonzero(luma < _DARK) / luma.size),
        bright=float(np.count_nonzero(luma > _BRIGHT) / luma.size),
        colour=_colour(channels, luma, mean, max(float(deviation), 1e-3)),
        two_levels=two_levels,
        damaged=damaged,
        red=float(red - green),
        blue=float(blue - green),
    )


def _colour(
    channels: NDArray[np.float32], luma: NDArray[np.float32], mean: np.float32, deviation: float
) -> float:
    # In place: fresh memory of this size costs more than what is computed in it.
    powers, rest = np.ones((4, luma.size), np.float32), np.empty((2, *luma.shape), np.float32)
    t = np.subtract(luma.ravel(), mean, out=powers[1])
    t /= deviation
    np.multiply(np.multiply(t, t, out=powers[2]), t, out=powers[3])
    np.subtract(channels[..., 2], luma, out=rest[0])
    np.subtract(channels[..., 0], luma, out=rest[1])
    rest = rest.reshape(2, -1)
    # Normal equations: 60 times as fast as a decomposition of all pixels. A plain image's are singular.
    rest -= (
        rest @ powers.T @ np.linalg.pinv((powers @ powers.T).astype(np.float64)).astype(np.float32) @ powers
    )
    rest *= rest
    return float(np.sqrt(rest.sum() / t.size))


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An accepted image: pixels uint8 side×side×3, its original upright size, its quality."""

    pixels: NDArray[np.uint8]
    width: int
    height: int
    content_type: ContentType
    quality: QualityMeasures
    preprocess_version: str = PREPROCESS_VERSION


def prepare_image(data: bytes, geometry: InputGeometry, limits: UploadLimits) -> PreparedImage:
    """Decode, resize and measure one upload.

    Raises TooLarge, UnsupportedImage, ImageTooSmall or UndecodableImage; nothing else a
    caller can cause.
    """
    content_type = sniff_content_type(data)
    decoded = decode_image(data, limits, target_side=geometry.side)
    pixels = resize_to_input(decoded.image, geometry, decoded.extent)
    quality = measure_quality(pixels, two_levels=decoded.two_levels, damaged=decoded.missing)
    return PreparedImage(pixels, decoded.width, decoded.height, content_type, quality)


def prepare_or_reject(data: bytes, spec: InputSpec, limits: UploadLimits) -> PreparedImage | RejectedUpload:
    """Prepare one upload for a model.

    A rejection is an answer, not a failure of the stage: it is returned, so that bad
    uploads neither fill the log with tracebacks nor count as errors.
    """
    try:
        return prepare_image(data, InputGeometry.from_manifest(spec), limits)
    except RejectedUpload as rejection:
        return rejection

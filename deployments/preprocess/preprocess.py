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
    centre = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4.0 * centre
    return QualityMeasures(
        sharpness=float(laplacian.var()),
        exposure=float(luma.mean() / 255.0),
        contrast=float(luma.std() / 255.0),
        dark=float((luma < _DARK).mean()),
        bright=float((luma > _BRIGHT).mean()),
        colour=_colour(channels, luma),
        two_levels=two_levels,
        damaged=damaged,
    )


def _colour(channels: NDArray[np.float32], luma: NDArray[np.float32]) -> float:
    deviation = max(float(luma.std()), 1e-3)
    t = ((luma - luma.mean()) / deviation).ravel()
    powers = np.stack([np.ones_like(t), t, t * t, t * t * t])
    chroma = np.stack([(channels[..., 2] - luma).ravel(), (channels[..., 0] - luma).ravel()])
    # Normal equations: 60 times as fast as a decomposition of all pixels. A plain image's are singular.
    weights = chroma @ powers.T @ np.linalg.pinv((powers @ powers.T).astype(np.float64)).astype(np.float32)
    rest = chroma - weights @ powers
    return float(np.sqrt((rest * rest).sum() / t.size))


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

"""One call from uploaded bytes to a prepared image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deployments.preprocess.decode import ContentType, UploadLimits, decode_image, sniff_content_type
from deployments.preprocess.quality import QualityMeasures, measure_quality
from deployments.preprocess.resize import PREPROCESS_VERSION, InputGeometry, resize_to_input
from model_store.manifest import InputSpec
from serve_app.domain.errors import RejectedUpload


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

"""The geometry that a model was trained with, as its manifest states it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.preprocess.orientation import Extent
from model_store.manifest import InputSpec
from serve_app.domain.errors import ModelContractError

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

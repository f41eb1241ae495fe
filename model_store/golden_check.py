"""Proof, on this processor, that a copy answers as it did where it was certified.

The same file need not answer alike everywhere: on x86 without VNNI, ONNX Runtime's kernels for
int8 weights add two products in 16 bits and saturate, and half of the answers change without
an error. So a copy proves itself on the golden vectors before it is used.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
import io
import json

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model_store.registry import StoredModel
from serve_app.domain.errors import ModelContractError

GOLDEN_NAME = "golden.json"

Forward = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32]]]


def check_golden(model: StoredModel, name: str, run: Forward) -> float:
    """Run the golden vectors through copy `name`; the largest difference of a logit.

    Raises ModelContractError when it is over the copy's tolerance, or `golden.json` has no such copy.
    """
    try:
        golden = json.loads(model.path(GOLDEN_NAME).read_bytes())
        tolerance = float(golden["logit_tolerance"][name])
        vectors = [(image["prepared_png"], image["copies"][name]["logits"]) for image in golden["images"]]
        expected = np.array([logits for _, logits in vectors])
        pixels = np.stack([_decode(text) for text, _ in vectors])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelContractError(
            f"{GOLDEN_NAME} has no vectors for {name}: {type(error).__name__}."
        ) from error
    difference = float(np.abs(run(pixels)[0] - expected).max())
    # A comparison that is false for not-a-number, so that it is refused.
    if not difference <= tolerance:
        raise ModelContractError(
            f"The edge copy {name} of {model.manifest.model_id} answers otherwise on this processor than where it "
            f"was certified: a logit differs by {difference:.3f}, {tolerance} is allowed. Use another copy."
        )
    return difference


def _decode(text: str) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(base64.b64decode(text)), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)

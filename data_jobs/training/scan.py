"""One forward pass over many archive images with ONNX Runtime, by the service's own preprocess."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import onnxruntime as ort
from PIL import Image, ImageFilter

from data_jobs.training.dataset import LabelledImage, load_pixels
from deployments.preprocess.pixels import InputGeometry
from model_store.session import Outputs

Pixels = NDArray[np.uint8]
#: A forward pass over uint8 N×side×side×3.
Run = Callable[[Pixels], Outputs]


def joined(parts: Iterable[Outputs]) -> Outputs:
    """The answers to batches as one, in their order."""
    columns: Iterable[tuple[Any, ...]] = zip(*parts, strict=True)
    arrays: list[Any] = [None if found[0] is None else np.concatenate(found) for found in columns]
    return Outputs(*arrays)


def open_onnx(model: Path | bytes, threads: int = 2) -> Run:
    """A forward pass of an exported graph, by its file or content, that has no manifest or needs none."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]

    def run(pixels: Pixels) -> Outputs:
        found = dict(zip(names, session.run(names, {"pixels": pixels}), strict=True))
        members, unknown = found.get("member_logits"), found.get("unknown")
        return Outputs(found["logits"], found["bottleneck"], members, unknown)

    return run


def soften(pixels: Pixels, radius: float = 0.7) -> Pixels:
    """N images under a Gaussian blur, by default a light one of 0.7 pixels at the input size."""
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in pixels])


def scan_pixels(run: Run, pixels: Pixels, batch: int = 32) -> Outputs:
    """Scan uint8 N×side×side×3."""
    return joined(run(np.ascontiguousarray(pixels[i : i + batch])) for i in range(0, len(pixels), batch))


def scan_images(
    run: Run,
    rows: list[LabelledImage],
    indices: Iterable[int],
    folder: Path,
    geometry: InputGeometry,
    batch: int = 32,
) -> Outputs:
    """Scan the rows at `indices`, a batch in memory at a time."""
    picked = list(indices)
    return joined(
        run(load_pixels(rows, picked[start : start + batch], folder, geometry))
        for start in range(0, len(picked), batch)
    )

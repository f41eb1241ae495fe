"""One forward pass over many archive images with ONNX Runtime, by the service's own preprocess."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
import onnxruntime as ort
from PIL import Image, ImageFilter

from data_jobs.training.dataset import LabelledImage, load_pixels
from deployments.preprocess.pixels import InputGeometry

Pixels = NDArray[np.uint8]
Outputs = tuple[NDArray[np.float32], NDArray[np.float32]]
#: A forward pass: uint8 N×side×side×3 to logits N×8 and bottleneck N×512.
Run = Callable[[Pixels], Outputs]


@dataclass(frozen=True, slots=True)
class Scan:
    """Logits N×8 and bottleneck N×512 of N images, float32."""

    logits: NDArray[np.float32]
    bottleneck: NDArray[np.float32]

    def part(self, picked: slice | NDArray[np.int64]) -> Self:
        """Of these of the images."""
        return type(self)(self.logits[picked], self.bottleneck[picked])

    @classmethod
    def joined(cls, parts: Iterable[Outputs]) -> Self:
        """Of the answers to batches, in their order."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def open_onnx(model: Path | bytes, threads: int = 2) -> Run:
    """A forward pass of an exported graph, by its file or content, that has no manifest or needs none."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def run(pixels: Pixels) -> Outputs:
        logits, bottleneck = session.run(["logits", "bottleneck"], {"pixels": pixels})
        return logits, bottleneck

    return run


def soften(pixels: Pixels, radius: float = 0.7) -> Pixels:
    """N images under a Gaussian blur, by default a light one of 0.7 pixels at the input size."""
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(image).filter(blur)) for image in pixels])


def scan_pixels(run: Run, pixels: Pixels, batch: int = 32) -> Scan:
    """Scan uint8 N×side×side×3."""
    return Scan.joined(run(np.ascontiguousarray(pixels[i : i + batch])) for i in range(0, len(pixels), batch))


def scan_images(
    run: Run,
    rows: list[LabelledImage],
    indices: Iterable[int],
    folder: Path,
    geometry: InputGeometry,
    batch: int = 32,
) -> Scan:
    """Scan the rows at `indices`, a batch in memory at a time."""
    picked = list(indices)
    return Scan.joined(
        run(load_pixels(rows, picked[start : start + batch], folder, geometry))
        for start in range(0, len(picked), batch)
    )

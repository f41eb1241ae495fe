"""Every copy there may be, the settings tried for it, best first, and how fast it is.

The order was found on fold 4 (docs/edge-copies.md has the figures): a build takes the first
setting of a kind that passes the gate on fold 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
import statistics
import time

import onnx

from data_jobs.training.edge.fold_images import Run
from data_jobs.training.edge.onnx_copies import Ranges, measure_ranges, write_float16, write_int8
from data_jobs.training.scan import Pixels, open_onnx
from model_store.edge_copies import Runtime


@dataclass(frozen=True)
class Source:
    """What every candidate is made from: the plain graph and the calibration images; `work` keeps files."""

    graph: onnx.ModelProto
    images: Pixels
    work: Path

    @cached_property
    def ranges(self) -> Ranges:
        """How far every tensor reaches on the calibration images."""
        return measure_ranges(self.graph, self.images)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One setting of one kind of copy; `make` writes its file."""

    setting: str
    make: Callable[[Source, Path], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A copy's name, its file in the model folder, what runs it and its candidates."""

    name: str
    file: str
    runtime: Runtime
    precision: str
    candidates: tuple[Candidate, ...]

    def open(self, path: Path, threads: int) -> Run:
        """A forward pass."""
        if self.runtime == "onnxruntime":
            return open_onnx(path, threads)
        # Only who builds or tests this copy needs the package.
        from data_jobs.training.edge.litert import open_litert  # noqa: PLC0415

        return open_litert(path, threads)


def _int8(setting: str, float_nodes: tuple[str, ...]) -> Candidate:
    return Candidate(setting, lambda source, path: write_int8(source.graph, source.ranges, float_nodes, path))


def _litert_float16(source: Source, path: Path) -> None:
    # torch, litert-torch and AI Edge Quantizer: an environment of their own.
    from data_jobs.training.edge.litert import convert, halve_weights  # noqa: PLC0415

    float32 = source.work / "litert.float32.tflite"
    if not float32.exists():
        partial = float32.with_suffix(".partial")
        convert(source.graph, source.images.shape[1], partial)
        partial.rename(float32)
    halve_weights(float32, path)


#: More than half of the error of quantised weights comes from here, and few of the weights are here.
_EARLY = ("/conv_stem/", "/blocks.0/", "/blocks.1/", "/blocks.2/blocks.2.0/")
_HEAD = ("/reduce/", "/classify/")

KINDS = (
    Kind(
        "float16",
        "model.float16.onnx",
        "onnxruntime",
        "float16",
        (Candidate("float16 weights", lambda source, path: write_float16(source.graph, path)),),
    ),
    Kind(
        "int8",
        "model.int8.onnx",
        "onnxruntime",
        "int8",
        (
            _int8("7-bit weights, early blocks and head float", _EARLY + _HEAD),
            _int8("7-bit weights, head float", _HEAD),
        ),
    ),
    Kind("litert", "model.tflite", "litert", "float16", (Candidate("float16 weights", _litert_float16),)),
)


ROUNDS = 30
_WARM_UP = 3


def latency_ratio(server: Run, copy: Run, pixels: Pixels) -> dict[str, float]:
    """Medians in milliseconds and their ratio; turns alternate, so that a busy machine slows both."""
    taken: tuple[list[float], list[float]] = ([], [])
    for round_ in range(_WARM_UP + ROUNDS):
        image = pixels[round_ % len(pixels)][None]
        for run, times in zip((server, copy), taken, strict=True):
            start = time.perf_counter()
            run(image)
            if round_ >= _WARM_UP:
                times.append(1e3 * (time.perf_counter() - start))
    medians = [statistics.median(times) for times in taken]
    return {
        "rounds": ROUNDS,
        "server_ms": round(medians[0], 2),
        "copy_ms": round(medians[1], 2),
        "ratio": round(medians[1] / medians[0], 3),
    }

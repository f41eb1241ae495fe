"""A forward pass of a LiteRT file on the CPU, one image at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ai_edge_litert.interpreter import Interpreter
import numpy as np

from data_jobs.training.scan import Outputs, Pixels


def open_litert(path: Path, threads: int) -> Callable[[Pixels], Outputs]:
    """Pixels uint8 N×side×side×3 to logits N×8 and bottleneck N×512, by XNNPACK's kernels."""
    interpreter = Interpreter(model_content=path.read_bytes(), num_threads=threads)
    run_one = interpreter.get_signature_runner()

    def run(pixels: Pixels) -> Outputs:
        answers = [run_one(pixels=image[None]) for image in pixels]
        return (
            np.concatenate([answer["logits"] for answer in answers]),
            np.concatenate([answer["bottleneck"] for answer in answers]),
        )

    return run

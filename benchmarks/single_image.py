"""One image, one core: what the network alone takes, beside a Fourier transform in the same run.

`python -m benchmarks.single_image --json [--models FOLDER]`: medians in milliseconds, in turns, of every model in the
folder and their ratio to NumPy's real Fourier transform of 1024x1024 numbers, which runs on one core as well.
Decoding, calibration and everything around the network are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import json
from pathlib import Path
import statistics
from time import perf_counter

import numpy as np

from data_jobs.training.scan import open_onnx
from model_store.registry import ModelStore, StoredModel
from serve_app.settings import model_folder

BASELINE = "Fourier transform"
_WARM_UP = 5


def forward(model: StoredModel) -> Callable[[], object]:
    """One pass over one drawn image, on one core."""
    run = open_onnx(model.path(model.manifest.onnx), threads=1)
    channels, height, width = model.manifest.input.input_size
    image = np.random.default_rng(1).integers(0, 256, (1, height, width, channels), dtype=np.uint8)
    return lambda: run(image)


def transform() -> Callable[[], object]:
    """What the networks are compared with."""
    numbers = np.random.default_rng(2).random((1024, 1024))
    return lambda: np.fft.rfft2(numbers)


def measure(store: ModelStore, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of everything, and its median ratio to the transform of the same round."""
    runs = {BASELINE: transform()} | {model_id: forward(store.open(model_id)) for model_id in store}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(_WARM_UP + rounds):
        for name, run in runs.items():
            started = perf_counter()
            run()
            if turn >= _WARM_UP:
                taken[name].append(1e3 * (perf_counter() - started))
    return {
        name: {
            "ms": round(statistics.median(times), 2),
            "ratio": round(statistics.median(np.divide(times, taken[BASELINE])), 2),
        }
        for name, times in taken.items()
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=model_folder(), help="the folder of model folders")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parsed = parser.parse_args()
    measured = measure(ModelStore(parsed.models), parsed.rounds)
    if parsed.json:
        print(json.dumps({"rounds": parsed.rounds, "runs": measured}, indent=1))
        return
    for name, figures in measured.items():
        print(f"{figures['ms']:8.2f} ms  {figures['ratio']:6.2f} x  {name}")


if __name__ == "__main__":
    main()

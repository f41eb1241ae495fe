"""One core, one image: a copy's time against the server's model, taken in turns."""

from __future__ import annotations

import statistics
import time

from data_jobs.training.edge.fold_images import Run
from data_jobs.training.scan import Pixels

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

"""A training step in float32, in torch's bfloat16 and as `train --bfloat16` takes it, in turns in one run.

`python -m benchmarks.training --recipe R --side 160 --json`: images a second of each and its ratio to
float32. Forward pass, loss, gradients, clipping, AdamW and the average of weights, on drawn pixels;
augmentation is left out. Worth running before a long run: without matrix units bfloat16 is slower.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
import statistics
import sys
from time import perf_counter

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_jobs.training.loss import AdjustedLoss, Mixture
from data_jobs.training.machine import CPU, Machine
from data_jobs.training.network import DermNetwork
from data_jobs.training.recipe import Recipe, read_recipe
from data_jobs.training.train import build_optimiser, run_epoch
from serve_app.domain.diagnosis import TRAINED

BFLOAT16 = Machine.of("cpu", bfloat16=True)
#: Name: where a step computes, and whether the network is prepared for it.
MODES = {"float32": (CPU, True), "bfloat16, torch's own": (BFLOAT16, False), "bfloat16": (BFLOAT16, True)}


class Steps:
    """One network, taking one step at a time."""

    def __init__(self, recipe: Recipe, side: int, machine: Machine, *, prepared: bool) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.machine = recipe, machine
        self.network = DermNetwork(recipe.architecture, recipe.network)
        (machine if prepared else CPU).prepare(self.network)
        self.average = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(recipe.optimiser.ema_decay), use_buffers=True
        )
        self.optimiser = build_optimiser(self.network, recipe.optimiser)
        self.loss = AdjustedLoss(np.full(len(TRAINED), 1.0 / len(TRAINED)), recipe.loss)
        size = recipe.optimiser.batch_size
        images = machine.as_input(torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8))
        labels = torch.arange(size) % len(TRAINED)
        self.mixture = Mixture(images, labels, labels, 1.0)

    def rate(self) -> float:
        """Images a second of one step."""
        started = perf_counter()
        run_epoch(
            self.network,
            self.average,
            self.optimiser,
            self.loss,
            iter([self.mixture]),
            iter([0.1]),
            self.recipe.optimiser.clip_norm,
            self.machine,
        )
        return len(self.mixture.labels) / (perf_counter() - started)


def measure(recipe: Recipe, side: int, rounds: int) -> dict[str, dict[str, float]]:
    """The median rate of every mode, and its median ratio to float32 in the same round."""
    steps = {
        name: Steps(recipe, side, machine, prepared=prepared) for name, (machine, prepared) in MODES.items()
    }
    for step in steps.values():
        step.rate()
    found = [{name: step.rate() for name, step in steps.items()} for _ in range(rounds)]
    return {
        name: {
            "images_a_second": round(statistics.median(r[name] for r in found), 1),
            "ratio_to_float32": round(statistics.median(r[name] / r["float32"] for r in found), 2),
        }
        for name in MODES
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", type=Path, default=Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml")
    )
    parser.add_argument("--side", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parsed = parser.parse_args()
    recipe = read_recipe(parsed.recipe)
    if not parsed.json:
        sys.stderr.write(f"{recipe.architecture} at {parsed.side} px, {torch.get_num_threads()} threads\n")
    report = {"architecture": recipe.architecture, "side": parsed.side, "cpus": torch.get_num_threads()}
    print(json.dumps(report | {"modes": measure(recipe, parsed.side, parsed.rounds)}, indent=1))


if __name__ == "__main__":
    main()

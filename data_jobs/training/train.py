"""Train a recipe: `python -m data_jobs.training.train --recipe R --cache-dir C --output O`.

After every epoch `O/checkpoint.pt` holds all that is needed to go on; a killed run started
again with the same command continues there, and one of another recipe is refused. `O/log.jsonl` has one
line an epoch. A recipe with `[start]` begins at the averaged weights of an earlier model's checkpoint
(`--start checkpoint.pt`), one with `[weights]` at timm's own for its trunk (`--start model.safetensors`).

`--device cuda` trains on a GPU, in bfloat16 where that is safe (autocast), with `--workers` processes that
augment: there one a core unless told otherwise, on a CPU one. `--bfloat16` does so on a CPU, which
is faster where that has matrix units (AMX) and much slower where it has none. A run that goes on there after a stop is as good as an undisturbed one; equal to the bit it is on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_jobs.training.dataset import (
    build_cache,
    isic_folder,
    labels_of,
    read_bcn84,
    read_rows,
    sources_of,
    training_indices,
)
from data_jobs.training.draws import AugmentedDraws, Labels, Pixels, sampled_prior
from data_jobs.training.machine import CPU, Machine
from data_jobs.training.network import DermNetwork, load_start
from data_jobs.training.recipe import BCN84_SIDE, Recipe, read_recipe
from data_jobs.training.steps import Run, write_weights
from data_jobs.training.teachers import Teachers
from deployments.preprocess.pixels import InputGeometry


def read_progress(checkpoint: Path, training_digest: str) -> dict[str, Any] | None:
    """What an earlier run of the recipe of this digest left to go on with; None when there is nothing yet.

    Raises ValueError when another recipe wrote it: its schedule and weights would pass for this one's.
    """
    if not checkpoint.exists():
        return None
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if (digest := state.get("recipe")) != training_digest:
        raise ValueError(
            f"{checkpoint} was trained under {'another recipe' if digest else 'a recipe that it does not name'} "
            f"({(digest or 'no digest')[:12]}, not {training_digest[:12]}): go on with the recipe that began "
            "it, or give another --output."
        )
    return state


def train(
    recipe: Recipe,
    pixels: Pixels,
    labels: Labels,
    indices: Labels,
    output: Path,
    start: Path | None = None,
    machine: Machine = CPU,
    models: Path | None = None,
    sources: Labels | None = None,
) -> None:
    """Run or continue the recipe; writes checkpoint.pt, log.jsonl and the averaged weights under `output`.

    `pixels`: N images uint8 side×side×3; `labels`: N, in the order of TRAINED; `indices`: which of them to train on;
    `sources`: N, in the order of SOURCES, all of the first unless given;
    `models`: where the model folders of its teachers are.
    Raises ValueError when another recipe wrote the checkpoint there, or as `load_start` and `Teachers` do.
    """
    checkpoint = output / "checkpoint.pt"
    state = read_progress(checkpoint, recipe.training_digest)
    torch.manual_seed(recipe.seed)
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe, start)
    output.mkdir(parents=True, exist_ok=True)
    sources = np.zeros_like(labels) if sources is None else sources
    run = Run(recipe, network, labels, sources, indices, machine)
    plan = recipe.distillation
    teachers = Teachers(plan, models, sampled_prior(labels[indices], 1.0)) if plan else None
    stages, first = recipe.epoch_stages, 0
    if state is not None:
        for name, part in run.parts.items():
            part.load_state_dict(state[name])
        first = state["epochs_done"]
    for epoch in range(first, len(stages)):
        stage = stages[epoch]
        side = plan.side if plan else stage.side

        def batches(draws: Labels, side: int = side, epoch: int = epoch) -> Iterable[tuple[Tensor, Tensor]]:
            views = AugmentedDraws(pixels, labels, draws, side, recipe, epoch)
            return machine.batches(views, recipe.optimiser)

        line = run.epoch(epoch, batches, teachers.teach if teachers else None)
        state = {name: part.state_dict() for name, part in run.parts.items()}
        state |= {"epochs_done": epoch + 1, "recipe": recipe.training_digest}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)
        write_weights(run.ema, output / f"stage-{recipe.stages.index(stage) + 1}.safetensors")
        with (output / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument(
        "--member", type=int, help="the fold that this member of an ensemble leaves out (default: none)"
    )
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--start", type=Path, help="what [start] or [weights] names: a checkpoint, or safetensors"
    )
    parser.add_argument(
        "--teachers", type=Path, help="the folder of the model folders that [distillation] names"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--workers", type=int, help="processes that augment (default: cuda one a core, cpu 1)"
    )
    parser.add_argument("--bfloat16", action="store_true", help="on a CPU with AMX, where it is faster")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    machine = Machine.of(arguments.device, arguments.workers, bfloat16=arguments.bfloat16)
    recipe = read_recipe(arguments.recipe)
    if arguments.member is not None:
        recipe = recipe.member(arguments.member)
    folder = isic_folder()
    rows = read_rows(folder)
    geometry = InputGeometry(recipe.data.cache_side, recipe.data.interpolation)
    pixels = list(build_cache(rows, folder, arguments.cache_dir, geometry))
    if recipe.data.with_bcn84:
        other = read_bcn84(folder)
        geometry = replace(geometry, side=BCN84_SIDE)
        pixels.extend(build_cache(other, folder, arguments.cache_dir, geometry))
        rows += other
    train(
        recipe,
        pixels,
        labels_of(rows),
        training_indices(rows, recipe.data),
        arguments.output,
        arguments.start,
        machine,
        arguments.teachers,
        sources_of(rows),
    )


if __name__ == "__main__":
    main()

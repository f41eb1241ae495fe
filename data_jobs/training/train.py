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
from collections.abc import Iterator
from dataclasses import replace
import json
import math
from pathlib import Path
import time
from typing import Any

import numpy as np
from safetensors.torch import save_file
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data_jobs.training.dataset import (
    BCN84_SIDE,
    build_cache,
    isic_folder,
    labels_of,
    read_bcn84,
    read_rows,
    sources_of,
    training_indices,
)
from data_jobs.training.draws import AugmentedDraws, Labels, Pixels, class_counts, draw_epoch, sampled_prior
from data_jobs.training.loss import AdjustedLoss, Mixture, Teachers, mix
from data_jobs.training.machine import CPU, Machine
from data_jobs.training.network import DermNetwork, load_start
from data_jobs.training.recipe import OptimiserPlan, Recipe, read_recipe
from deployments.preprocess.pixels import InputGeometry


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Factor of the peak: linear warm-up, then a cosine to zero."""
    ramp = max(1.0, warmup * total)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(1.0, total - ramp)))


def build_optimiser(network: DermNetwork, plan: OptimiserPlan) -> torch.optim.AdamW:
    """AdamW in four groups: trunk and head, each with and without weight decay (norms, biases)."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("trunk."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": plan.trunk_lr if trunk else plan.head_lr,
                "weight_decay": plan.weight_decay if decayed else 0.0,
            }
            for (trunk, decayed), parameters in groups.items()
        ]
    )


def run_epoch(
    network: DermNetwork,
    ema: AveragedModel,
    optimiser: torch.optim.Optimizer,
    loss: AdjustedLoss,
    mixtures: Iterator[Mixture],
    factors: Iterator[float],
    clip_norm: float,
    machine: Machine = CPU,
) -> tuple[float, float]:
    """Train over `mixtures`; returns mean loss and training accuracy."""
    network.train()
    # Kept where they are computed: to read one would make a GPU wait at every batch.
    losses, hits, seen = torch.zeros(()), torch.zeros(()), 0
    for mixture, factor in zip(mixtures, factors, strict=False):
        labels = mixture.labels
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.zero_grad(set_to_none=True)
        with machine.autocast():
            logits, _ = network(mixture.images)
        value = loss(logits.float(), mixture)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimiser.step()
        ema.update_parameters(network)
        losses = losses.to(labels.device) + value.detach() * len(labels)
        hits = hits.to(labels.device) + (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
    return float(losses / seen), float(hits / seen)


def read_progress(checkpoint: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What an earlier run of this recipe left to go on with; None when there is nothing yet.

    Raises ValueError when another recipe wrote it: its schedule and weights would pass for this one's.
    """
    if not checkpoint.exists():
        return None
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if (digest := state.get("recipe")) != recipe.training_digest:
        raise ValueError(
            f"{checkpoint} was trained under {'another recipe' if digest else 'a recipe that it does not name'} "
            f"({(digest or 'no digest')[:12]}, not {recipe.training_digest[:12]}): go on with the recipe that began "
            "it, or give another --output."
        )
    return state


def write_weights(ema: AveragedModel, path: Path) -> None:
    """The averaged weights in float16 (counters as they are), whole or not at all: half a checkpoint's tenth."""
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in ema.module.state_dict().items()
    }
    if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
        raise ValueError(f"A weight is beyond what float16 can hold: {path} is not written.")
    save_file(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


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
    state = read_progress(checkpoint, recipe)
    torch.manual_seed(recipe.seed)
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe, start)
    output.mkdir(parents=True, exist_ok=True)
    machine.prepare(network)
    decay = get_ema_multi_avg_fn(recipe.optimiser.ema_decay)
    ema = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    optimiser = build_optimiser(network, recipe.optimiser)
    plan = recipe.distillation
    teachers = Teachers(plan, models, sampled_prior(labels[indices], 1.0)) if plan else None
    sources = np.zeros_like(labels) if sources is None else sources
    power, stages = recipe.loss.sampling_power, recipe.epoch_stages
    counts = [
        class_counts(labels[indices], sources[indices], power, stage, stage.draws or len(indices))
        for stage in stages
    ]
    size = recipe.optimiser.batch_size
    steps = [int(count.sum()) // size for count in counts]
    first = 0
    if state is not None:
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epochs_done"]
    for epoch in range(first, len(stages)):
        started = time.monotonic()
        stage = stages[epoch]
        rng = np.random.default_rng((recipe.seed, epoch))
        torch.manual_seed(recipe.seed + epoch)
        draws = draw_epoch(labels, sources, indices, counts[epoch], rng)
        loss = AdjustedLoss(counts[epoch].sum(1) / len(draws), recipe.loss, plan.loss_share if plan else 0.0)
        loss.to(machine.device)
        side = plan.side if plan else stage.side
        views = AugmentedDraws(pixels, labels, draws, side, recipe, epoch)
        batches = machine.batches(views, recipe.optimiser)
        done = sum(steps[:epoch])
        factors = (
            learning_rate(step, sum(steps), recipe.optimiser.warmup)
            for step in range(done, done + steps[epoch])
        )
        mixtures = (
            mix(machine.as_input(images), answers.to(machine.device), recipe.loss.mixup, rng)
            for images, answers in tqdm(batches, f"epoch {epoch + 1} of {len(stages)}", mininterval=30.0)
        )
        mean_loss, accuracy = run_epoch(
            network,
            ema,
            optimiser,
            loss,
            teachers.teach(mixtures, stage.side) if teachers else mixtures,
            factors,
            recipe.optimiser.clip_norm,
            machine,
        )
        parts = {"network": network, "ema": ema, "optimiser": optimiser}
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"epochs_done": epoch + 1, "recipe": recipe.training_digest}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)
        write_weights(ema, output / f"stage-{recipe.stages.index(stage) + 1}.safetensors")
        line = {
            "epoch": epoch,
            "side": stage.side,
            "loss": round(mean_loss, 4),
            "train_accuracy": round(accuracy, 4),
            "seconds": round(time.monotonic() - started, 1),
        }
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

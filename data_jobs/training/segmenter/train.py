"""Train a segmenter: `python -m data_jobs.training.segmenter.train --recipe R --start C --cache-dir D --output O`.

As `data_jobs.training.train`: after every epoch `O/checkpoint.pt` holds all that is needed to go on, and the same
command goes on there; `O/log.jsonl` has one line an epoch, `O/stage-N.safetensors` the averaged weights. `C` is the
checkpoint that `[start]` names. `--threads` of processor time at most; the views are made by the same process unless
`--workers` says otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
import json
import math
from pathlib import Path
import time

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from data_jobs.training.augment import augment_outlined
from data_jobs.training.dataset import build_cache, isic_folder, read_rows, training_indices
from data_jobs.training.machine import CPU, Machine
from data_jobs.training.network import read_start
from data_jobs.training.segmenter.masks import build_masks, outlined
from data_jobs.training.segmenter.network import SegmenterNetwork, load_classifier, outline_loss
from data_jobs.training.segmenter.recipe import SegmenterRecipe, read_segmenter_recipe
from data_jobs.training.steps import build_optimiser, learning_rate, write_weights
from data_jobs.training.train import read_progress
from deployments.preprocess.pixels import InputGeometry

Pixels = NDArray[np.uint8]


class OutlinedDraws(Dataset[tuple[Tensor, Tensor]]):
    """One epoch's draws: position -> an augmented view and its mask, seeded by (seed, epoch, position)."""

    def __init__(
        self, pixels: Pixels, masks: Pixels, draws: NDArray[np.int64], recipe: SegmenterRecipe, epoch: int
    ) -> None:
        """`pixels` N×H×H×3 and `masks` N×M×M of the same N images; `draws`: which of them, in order."""
        self.pixels, self.masks, self.draws = pixels, masks, draws
        self.recipe, self.epoch = recipe, epoch

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.recipe.seed, self.epoch, position))
        index, stage = self.draws[position], self.recipe.epoch_stages[self.epoch]
        cluttered = rng.random() < (stage.clutter or 0.0)
        image, mask = self.pixels[index], self.masks[index]
        view, outline = augment_outlined(
            image, mask, stage.side, self.recipe.augment, rng, cluttered=cluttered
        )
        return torch.from_numpy(view), torch.from_numpy(outline.copy())


def drawn(count: int, draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`draws` of `count` images; none comes up again before all have."""
    rounds = [rng.permutation(count) for _ in range(math.ceil(draws / count))]
    return np.concatenate(rounds)[:draws]


def run_epoch(
    network: SegmenterNetwork,
    ema: AveragedModel,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    factors: Iterable[float],
    clip_norm: float,
    machine: Machine,
) -> float:
    """Train over views uint8 N×S×S×3 and masks N×S×S; returns the mean loss."""
    network.train()
    losses, seen = 0.0, 0
    for (views, masks), factor in zip(batches, factors, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.zero_grad(set_to_none=True)
        truth = nn.functional.avg_pool2d(masks.to(machine.device).unsqueeze(1).float() / 255.0, 2)
        with machine.autocast():
            logits = network(machine.as_input(views))
        loss = outline_loss(logits.float(), truth)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimiser.step()
        ema.update_parameters(network)
        losses, seen = losses + float(loss.detach()) * len(views), seen + len(views)
    return losses / seen


def train(
    recipe: SegmenterRecipe, pixels: Pixels, masks: Pixels, output: Path, start: Path, machine: Machine = CPU
) -> None:
    """Run or continue the recipe on N images and their masks; writes under `output` as the module says.

    Raises ValueError when another recipe wrote the checkpoint there, or `start` is not what the recipe names.
    """
    checkpoint = output / "checkpoint.pt"
    state = read_progress(checkpoint, recipe.training_digest)
    torch.manual_seed(recipe.seed)
    network = SegmenterNetwork(recipe.trunk, recipe.network)
    load_classifier(network, recipe.trunk, read_start(recipe.start, start))
    output.mkdir(parents=True, exist_ok=True)
    machine.prepare(network)
    plan = recipe.optimiser
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(plan.ema_decay), use_buffers=True)
    optimiser = build_optimiser(network, plan)
    parts = {"network": network, "ema": ema, "optimiser": optimiser}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    stages = recipe.epoch_stages
    counts = [stage.draws or len(pixels) for stage in stages]
    steps = [count // plan.batch_size for count in counts]
    for epoch in range(state["epochs_done"] if state else 0, len(stages)):
        started, stage = time.monotonic(), stages[epoch]
        torch.manual_seed(recipe.seed + epoch)
        draws = drawn(len(pixels), counts[epoch], np.random.default_rng((recipe.seed, epoch)))
        done, total = sum(steps[:epoch]), sum(steps)
        factors = (learning_rate(done + step, total, plan.warmup) for step in range(steps[epoch]))
        batches = machine.batches(OutlinedDraws(pixels, masks, draws, recipe, epoch), plan)
        name = f"epoch {epoch + 1} of {len(stages)}"
        watched = tqdm(batches, name, mininterval=30.0)
        loss = run_epoch(network, ema, optimiser, watched, factors, plan.clip_norm, machine)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"epochs_done": epoch + 1, "recipe": recipe.training_digest}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)
        write_weights(ema, output / f"stage-{recipe.stages.index(stage) + 1}.safetensors")
        seconds = round(time.monotonic() - started, 1)
        line = json.dumps({"epoch": epoch, "side": stage.side, "loss": round(loss, 4), "seconds": seconds})
        with (output / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    """Command line: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = read_segmenter_recipe(arguments.recipe)
    folder = isic_folder()
    rows = read_rows(folder)
    cached = build_cache(
        rows, folder, arguments.cache_dir, InputGeometry(recipe.data.cache_side, recipe.data.interpolation)
    )
    indices = np.intersect1d(training_indices(rows, recipe.data), outlined(rows, folder))
    masks = build_masks(rows, indices, folder, arguments.cache_dir, recipe)
    machine = Machine.of("cpu", arguments.workers)
    train(recipe, cached[indices], masks, arguments.output, arguments.start, machine)


if __name__ == "__main__":
    main()

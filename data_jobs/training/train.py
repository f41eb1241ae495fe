"""Train a recipe: `python -m data_jobs.training.train --recipe R --cache-dir C --output O`.

After every epoch `O/checkpoint.pt` holds all that is needed to go on; a killed run started
again with the same command continues there. `O/log.jsonl` has one line an epoch. A recipe with
`[start]` begins at the averaged weights of an earlier model's checkpoint: `--start checkpoint.pt`.

`--device cuda` trains on a GPU, in bfloat16 where that is safe (autocast), with `--workers` processes that
augment. A run that goes on there after a stop is as good as an undisturbed one; equal to the bit it is on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
import hashlib
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from data_jobs.training.dataset import build_cache, isic_folder, labels_of, read_rows, training_indices
from data_jobs.training.draws import AugmentedDraws, Labels, Pixels, draw_epoch, sampled_prior
from data_jobs.training.loss import AdjustedLoss, Mixture, mix
from data_jobs.training.network import DermNetwork, load_imagenet, wheel_weights
from data_jobs.training.recipe import OptimiserPlan, Recipe, StartPlan, read_recipe
from deployments.preprocess.resize import InputGeometry


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


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run computes, and how many processes augment for it."""

    device: torch.device
    workers: int = 1

    def batches(self, views: AugmentedDraws, plan: OptimiserPlan) -> DataLoader[tuple[Tensor, Tensor]]:
        """The views in batches of the plan's size, the remainder dropped."""
        return DataLoader(
            views,
            plan.batch_size,
            drop_last=True,
            num_workers=self.workers,
            prefetch_factor=4,
            pin_memory=self.device.type == "cuda",
        )

    def as_input(self, views: Tensor) -> Tensor:
        """uint8 N×H×W×3 to float N×3×H×W in channels-last memory, on the device."""
        moved = views.to(self.device, non_blocking=True)
        return moved.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)


CPU = Machine(torch.device("cpu"))


def run_epoch(
    network: DermNetwork,
    ema: AveragedModel,
    optimiser: torch.optim.Optimizer,
    loss: AdjustedLoss,
    mixtures: Iterator[Mixture],
    factors: Iterator[float],
    clip_norm: float,
    show: Callable[[int, Tensor], None] = lambda _seen, _loss: None,
) -> tuple[float, float]:
    """Train over `mixtures`; returns mean loss and training accuracy. `show` hears of every batch."""
    network.train()
    # Kept where they are computed: to read one would make a GPU wait at every batch.
    losses, hits, seen = torch.zeros(()), torch.zeros(()), 0
    for mixture, factor in zip(mixtures, factors, strict=False):
        labels = mixture.labels
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.is_cuda):
            logits, _ = network(mixture.images)
        value = loss(logits.float(), mixture)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimiser.step()
        ema.update_parameters(network)
        losses = losses.to(labels.device) + value.detach() * len(labels)
        hits = hits.to(labels.device) + (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
        show(seen, losses / seen)
    return float(losses / seen), float(hits / seen)


class EpochProgress:
    """A line now and then: how far the epoch is, how fast, and how long it still takes."""

    def __init__(self, epoch: int, epochs: int, images: int, every_s: float = 30.0) -> None:
        self._epoch, self._epochs, self._images, self._every_s = epoch, epochs, images, every_s
        self._started = self._shown = time.monotonic()

    def __call__(self, seen: int, loss: Tensor) -> None:
        """Say so, unless it was said a moment ago."""
        now = time.monotonic()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        rate = seen / (now - self._started)
        minutes, seconds = divmod(round((self._images - seen) / rate), 60)
        sys.stderr.write(
            f"epoch {self._epoch + 1} of {self._epochs}: {seen} of {self._images} images, "
            f"{rate:.1f} a second, loss {float(loss):.3f}; {minutes} min {seconds:02} s left\n"
        )
        sys.stderr.flush()


def load_start(network: DermNetwork, plan: StartPlan | None, checkpoint: Path | None) -> None:
    """Give the network the weights that its recipe starts from: ImageNet's, or an earlier model's.

    Raises ValueError when the checkpoint is not the one that the recipe names.
    """
    if plan is None:
        load_imagenet(network, wheel_weights())
        return
    if checkpoint is None:
        raise ValueError(f"This recipe starts from {plan.model_id}: give its checkpoint with --start.")
    if hashlib.sha256(checkpoint.read_bytes()).hexdigest() != plan.checkpoint_sha256:
        raise ValueError(f"{checkpoint} is not the checkpoint of {plan.model_id} that the recipe names.")
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    averaged = AveragedModel(network, use_buffers=True)
    averaged.load_state_dict(state["ema"])
    network.load_state_dict(averaged.module.state_dict())


def train(
    recipe: Recipe,
    pixels: Pixels,
    labels: Labels,
    indices: Labels,
    output: Path,
    start: Path | None = None,
    machine: Machine = CPU,
) -> None:
    """Run or continue the recipe; writes checkpoint.pt and log.jsonl under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe.start, start)
    network.to(machine.device, memory_format=torch.channels_last)
    decay = get_ema_multi_avg_fn(recipe.optimiser.ema_decay)
    ema = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    optimiser = build_optimiser(network, recipe.optimiser)
    loss = AdjustedLoss(sampled_prior(labels[indices], recipe.loss.sampling_power), recipe.loss)
    loss.to(machine.device)
    checkpoint = output / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["epochs_done"]
    sides = recipe.epoch_sides
    for epoch in range(first, len(sides)):
        started = time.monotonic()
        rng = np.random.default_rng((recipe.seed, epoch))
        torch.manual_seed(recipe.seed + epoch)
        draws = draw_epoch(labels, indices, recipe.loss.sampling_power, rng)
        views = AugmentedDraws(pixels, labels, draws, sides[epoch], recipe, epoch)
        batches = machine.batches(views, recipe.optimiser)
        steps = len(batches)
        factors = (
            learning_rate(step, steps * len(sides), recipe.optimiser.warmup)
            for step in range(epoch * steps, (epoch + 1) * steps)
        )
        mean_loss, accuracy = run_epoch(
            network,
            ema,
            optimiser,
            loss,
            (
                mix(machine.as_input(images), answers.to(machine.device), recipe.loss.mixup, rng)
                for images, answers in batches
            ),
            factors,
            recipe.optimiser.clip_norm,
            EpochProgress(epoch, len(sides), len(draws)),
        )
        state = {"network": network.state_dict(), "ema": ema.state_dict()}
        state |= {"optimiser": optimiser.state_dict(), "epochs_done": epoch + 1}
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)
        line = {
            "epoch": epoch,
            "side": sides[epoch],
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
    parser.add_argument("--cache-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint.pt of the model that the recipe starts from")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that augment")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    machine = Machine(torch.device(arguments.device), arguments.workers)
    recipe = read_recipe(arguments.recipe)
    folder = isic_folder()
    rows = read_rows(folder)
    geometry = InputGeometry(recipe.data.cache_side, recipe.data.interpolation)
    pixels = build_cache(rows, folder, arguments.cache_dir, geometry)
    indices = training_indices(rows, recipe.data)
    train(recipe, pixels, labels_of(rows), indices, arguments.output, arguments.start, machine)


if __name__ == "__main__":
    main()

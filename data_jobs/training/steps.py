"""A network on its way through a recipe, epoch by epoch, whoever makes the views: a CPU's processes or the GPU itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
import math
from pathlib import Path
import time

import numpy as np
from safetensors.torch import save_file
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data_jobs.training.draws import Labels, class_counts, draw_epoch
from data_jobs.training.loss import AdjustedLoss, Mixture, mix
from data_jobs.training.machine import CPU, Machine
from data_jobs.training.network import DermNetwork
from data_jobs.training.recipe import OptimiserPlan, Recipe

#: Batches of views N×H×W×3, 0 to 255, and their labels N, for the rows that an epoch draws.
Batches = Callable[[Labels], Iterable[tuple[Tensor, Tensor]]]
#: Adds what teachers say to the mixtures, for a student at this side.
Teach = Callable[[Iterator[Mixture], int], Iterator[Mixture]]


def learning_rate(step: float, total: float, warmup: float) -> float:
    """Factor of the peak: linear warm-up, then a cosine to zero."""
    ramp = max(1.0, warmup * total)
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1.0 + math.cos(math.pi * (step - ramp) / max(1.0, total - ramp)))


def build_optimiser(network: nn.Module, plan: OptimiserPlan) -> torch.optim.AdamW:
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


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float16, counters as they are."""
    return {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in state.items()
    }


def write_weights(ema: AveragedModel, path: Path) -> None:
    """The averaged weights in float16, whole or not at all: half a checkpoint's tenth."""
    state = halved(ema.module.state_dict())
    if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
        raise ValueError(f"A weight is beyond what float16 can hold: {path} is not written.")
    save_file(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)


@dataclass(frozen=True, slots=True)
class Turn:
    """An epoch of a run that has a time instead of a number of epochs.

    `stage` is the place of its stage; `before` and `after` are the shares of the time that are over before and after
    it, which the learning rate follows.
    """

    stage: int
    before: float
    after: float


class Run:
    """A network, its moving average and its optimiser, and how often each epoch draws of every class and source."""

    def __init__(
        self,
        recipe: Recipe,
        network: DermNetwork,
        labels: Labels,
        sources: Labels,
        indices: Labels,
        machine: Machine = CPU,
    ) -> None:
        """`labels`, `sources`: of all images, in the orders of TRAINED and SOURCES; `indices`: which to train on."""
        machine.prepare(network)
        self.recipe, self.network, self.machine = recipe, network, machine
        self.labels, self.sources, self.indices = labels, sources, indices
        decay = get_ema_multi_avg_fn(recipe.optimiser.ema_decay)
        self.ema = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
        self.optimiser = build_optimiser(network, recipe.optimiser)
        self.parts = {"network": network, "ema": self.ema, "optimiser": self.optimiser}
        power = recipe.loss.sampling_power
        self.counts = [
            class_counts(labels[indices], sources[indices], power, stage, stage.draws or len(indices))
            for stage in recipe.epoch_stages
        ]
        self.steps = [int(count.sum()) // recipe.optimiser.batch_size for count in self.counts]

    def epoch(
        self, epoch: int, batches: Batches, teach: Teach | None = None, turn: Turn | None = None
    ) -> dict[str, float]:
        """Train one epoch of the recipe, or a turn; returns its line of the log."""
        started, recipe = time.monotonic(), self.recipe
        place = epoch if turn is None else turn.stage
        stage, counts, plan = recipe.epoch_stages[place], self.counts[place], recipe.distillation
        rng = np.random.default_rng((recipe.seed, epoch))
        torch.manual_seed(recipe.seed + epoch)
        draws = draw_epoch(self.labels, self.sources, self.indices, counts, rng)
        loss = AdjustedLoss(counts.sum(1) / len(draws), recipe.loss, plan.loss_share if plan else 0.0)
        loss.to(self.machine.device)
        count, done, total = self.steps[place], float(sum(self.steps[:place])), float(sum(self.steps))
        if turn is not None:
            # As if the run had as many steps as make this turn's share of the time.
            total = count / (turn.after - turn.before)
            done = turn.before * total
        factors = (learning_rate(done + i, total, recipe.optimiser.warmup) for i in range(count))
        name = f"epoch {epoch + 1}"
        mixtures = (
            mix(self.machine.as_input(images), answers.to(self.machine.device), recipe.loss.mixup, rng)
            for images, answers in tqdm(batches(draws), name, mininterval=30.0)
        )
        mean_loss, accuracy = run_epoch(
            self.network,
            self.ema,
            self.optimiser,
            loss,
            teach(mixtures, stage.side) if teach else mixtures,
            factors,
            recipe.optimiser.clip_norm,
            self.machine,
        )
        return {
            "epoch": epoch,
            "side": stage.side,
            "loss": round(mean_loss, 4),
            "train_accuracy": round(accuracy, 4),
            "seconds": round(time.monotonic() - started, 1),
        }

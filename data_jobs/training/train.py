"""Train a recipe: `python -m data_jobs.training.train --recipe R --cache-dir C --output O`.

After every epoch `O/checkpoint.pt` holds all that is needed to go on; a killed run started
again with the same command continues there. `O/log.jsonl` has one line an epoch. A recipe with
`[start]` begins at the averaged weights of an earlier model's checkpoint: `--start checkpoint.pt`.
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
from numpy.typing import NDArray
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from data_jobs.training.augment import augment
from data_jobs.training.dataset import build_cache, isic_folder, labels_of, read_rows, training_indices
from data_jobs.training.network import DermNetwork, load_imagenet, wheel_weights
from data_jobs.training.recipe import LossPlan, OptimiserPlan, Recipe, StartPlan, read_recipe
from deployments.preprocess.resize import InputGeometry
from serve_app.domain.diagnosis import TRAINED

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


class AugmentedDraws(Dataset[tuple[Tensor, int]]):
    """One epoch's draws: position -> an augmented view, seeded by (seed, epoch, position)."""

    def __init__(
        self, pixels: Pixels, labels: Labels, draws: Labels, side: int, recipe: Recipe, epoch: int
    ) -> None:
        self.pixels, self.labels, self.draws = pixels, labels, draws
        self.side, self.recipe, self.epoch = side, recipe, epoch

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng((self.recipe.seed, self.epoch, position))
        index = self.draws[position]
        view = augment(self.pixels[index], self.side, self.recipe.augment, rng)
        return torch.from_numpy(view), int(self.labels[index])


def draw_epoch(labels: Labels, indices: Labels, power: float, rng: np.random.Generator) -> Labels:
    """As many draws as there are indices; a class of n images gets a share in proportion to n**power.

    Within a class every image comes up equally often, give or take one: no image of a common
    class is drawn twice before each is drawn once.
    """
    shares = sampled_prior(labels[indices], power)
    draws = []
    for label, share in enumerate(shares):
        members = indices[labels[indices] == label]
        count = round(share * len(indices))
        repeats = math.ceil(count / max(1, len(members)))
        rounds = [rng.permutation(members) for _ in range(repeats)]
        draws.append(np.concatenate([np.empty(0, np.int64), *rounds])[:count])
    return rng.permutation(np.concatenate(draws))


def sampled_prior(labels: Labels, power: float) -> NDArray[np.float64]:
    """Class shares after sampling in proportion to n**power."""
    counts = np.bincount(labels, minlength=len(TRAINED)).astype(np.float64) ** power
    return counts / counts.sum()


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
class Mixture:
    """A batch of images N×3×H×W, each `share` of itself and 1 - `share` of its partner; both labels."""

    images: Tensor
    labels: Tensor
    partners: Tensor
    share: float


def mix(images: Tensor, labels: Tensor, alpha: float, rng: np.random.Generator) -> Mixture:
    """Mixup (Zhang et al., ICLR 2018): one share a batch from Beta(alpha, alpha), the larger part kept."""
    if alpha == 0.0:
        return Mixture(images, labels, labels, 1.0)
    share = float(rng.beta(alpha, alpha))
    share = max(share, 1.0 - share)
    order = torch.from_numpy(rng.permutation(len(labels)))
    return Mixture(torch.lerp(images[order], images, share), labels, labels[order], share)


class AdjustedLoss(nn.Module):
    """Cross-entropy of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10)."""

    def __init__(self, prior: NDArray[np.float64], plan: LossPlan) -> None:
        super().__init__()
        adjustment = plan.logit_adjustment * np.log(prior)
        self.register_buffer("adjustment", torch.from_numpy(adjustment).float())
        self.loss = nn.CrossEntropyLoss(label_smoothing=plan.label_smoothing)

    def forward(self, logits: Tensor, mixture: Mixture) -> Tensor:
        """Mean loss of a batch."""
        adjusted = logits + self.adjustment
        loss: Tensor = self.loss(adjusted, mixture.labels)
        if mixture.share < 1.0:
            loss = mixture.share * loss + (1.0 - mixture.share) * self.loss(adjusted, mixture.partners)
        return loss


def as_input(views: Tensor) -> Tensor:
    """uint8 N×H×W×3 to float N×3×H×W in channels-last memory."""
    return views.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)


def run_epoch(
    network: DermNetwork,
    ema: AveragedModel,
    optimiser: torch.optim.Optimizer,
    loss: AdjustedLoss,
    mixtures: Iterator[Mixture],
    factors: Iterator[float],
    clip_norm: float,
    show: Callable[[int, float], None] = lambda _seen, _loss: None,
) -> tuple[float, float]:
    """Train over `mixtures`; returns mean loss and training accuracy. `show` hears of every batch."""
    network.train()
    losses, hits, seen = 0.0, 0, 0
    for mixture, factor in zip(mixtures, factors, strict=False):
        labels = mixture.labels
        for group in optimiser.param_groups:
            group["lr"] = factor * group["peak"]
        optimiser.zero_grad(set_to_none=True)
        logits, _ = network(mixture.images)
        value = loss(logits, mixture)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
        optimiser.step()
        ema.update_parameters(network)
        losses += float(value.detach()) * len(labels)
        hits += int((logits.detach().argmax(1) == labels).sum())
        seen += len(labels)
        show(seen, losses / seen)
    return losses / seen, hits / seen


class EpochProgress:
    """A line now and then: how far the epoch is, how fast, and how long it still takes."""

    def __init__(self, epoch: int, epochs: int, images: int, every_s: float = 30.0) -> None:
        self._epoch, self._epochs, self._images, self._every_s = epoch, epochs, images, every_s
        self._started = self._shown = time.monotonic()

    def __call__(self, seen: int, loss: float) -> None:
        """Say so, unless it was said a moment ago."""
        now = time.monotonic()
        if now - self._shown < self._every_s:
            return
        self._shown = now
        rate = seen / (now - self._started)
        minutes, seconds = divmod(round((self._images - seen) / rate), 60)
        sys.stderr.write(
            f"epoch {self._epoch + 1} of {self._epochs}: {seen} of {self._images} images, "
            f"{rate:.1f} a second, loss {loss:.3f}; {minutes} min {seconds:02} s left\n"
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
    recipe: Recipe, pixels: Pixels, labels: Labels, indices: Labels, output: Path, start: Path | None = None
) -> None:
    """Run or continue the recipe; writes checkpoint.pt and log.jsonl under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe.start, start)
    network.to(memory_format=torch.channels_last)
    decay = get_ema_multi_avg_fn(recipe.optimiser.ema_decay)
    ema = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    optimiser = build_optimiser(network, recipe.optimiser)
    loss = AdjustedLoss(sampled_prior(labels[indices], recipe.loss.sampling_power), recipe.loss)
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
        batches = DataLoader(
            views, recipe.optimiser.batch_size, drop_last=True, num_workers=1, prefetch_factor=4
        )
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
            (mix(as_input(images), answers, recipe.loss.mixup, rng) for images, answers in batches),
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
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.recipe)
    folder = isic_folder()
    rows = read_rows(folder)
    geometry = InputGeometry(recipe.data.cache_side, recipe.data.interpolation)
    pixels = build_cache(rows, folder, arguments.cache_dir, geometry)
    indices = training_indices(rows, recipe.data)
    train(recipe, pixels, labels_of(rows), indices, arguments.output, arguments.start)


if __name__ == "__main__":
    main()

"""Train all members of an ensemble in a GPU's minutes: `... gpu_run --recipe R --parts P --output O --minutes 9`.

It needs torch, timm, numpy, Pillow (and what timm brings: safetensors, tqdm), the folder that `pack` wrote and this
repository's files, no archive and no service. Images stay on the GPU, where every view is made. The recipe's epochs are
shares of the time: the members take turns, an epoch each, as long as there is time for another round, and the learning
rate follows the clock, so that it has fallen to nothing when the time is over. After each round their averaged weights
are written together: whenever it is stopped, `O/member-K.safetensors` are equals (float16; K is the fold that the member
leaves out). `O/run.json` has the rounds of every stage and, at the end, parity with a CPU and the latency of a forward
pass; `O/log.jsonl` a line an epoch.

`--batch N` trains in other batches than the recipe's: learning rates change by the square root of the ratio
(Malladi et al., NeurIPS 2022, for Adam), and the moving average forgets as much an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
import json
import os
from pathlib import Path
import statistics
import time
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file
import torch
from torch import Tensor
from torch.nn import functional

from data_jobs.training.device_views import DeviceViews, Overlays
from data_jobs.training.draws import Labels
from data_jobs.training.machine import Machine
from data_jobs.training.network import DermNetwork, load_weights
from data_jobs.training.parts import PackedImages, PackHeader, start_of
from data_jobs.training.recipe import Recipe, Stage, read_recipe
from data_jobs.training.steps import Run, Turn, write_weights

#: Views that are made at once: first few, since training waits for them, then many, which cost hardly more.
_FIRST, _AT_ONCE = 512, 4096
#: Seconds kept for parity and latency at the end, on a GPU; and the share of the time that a first round is taken for.
_END_S = 15.0
_FIRST_SHARE = 0.02
_CHECKED = 64


class Trainer:
    """The members of an ensemble on one device, over the same resident images."""

    def __init__(
        self, recipe: Recipe, packed: PackedImages, start: Path, overlays: Overlays, machine: Machine
    ) -> None:
        """`start`: the `start.safetensors` of the pack.

        Raises ValueError when the pack is of another plan or start, or the recipe is taught by others.
        """
        if recipe.distillation is not None:
            raise ValueError("A recipe with teachers is trained by `train`: they are not in the pack.")
        if packed.header.plan != PackHeader.plan_of(recipe.data):
            raise ValueError("The pack was made under another [data] than this recipe's.")
        with safe_open(start, "pt") as file:
            if (named := file.metadata()["start"]) != start_of(recipe):
                raise ValueError(f"{start} is {named}, not {start_of(recipe)}.")
        self.recipe, self.packed, self.machine = recipe, packed, machine
        self._start = load_file(start)
        device = machine.device
        pixels = [images.to(device) for images in packed.pixels]
        self.views = DeviceViews(pixels, packed.columns["sources"], overlays.to(device), recipe.augment)
        self._labels = torch.from_numpy(packed.columns["labels"]).to(device)

    def run(self, member: Recipe) -> Run:
        """A member at its start."""
        torch.manual_seed(member.seed)
        network = DermNetwork(member.architecture, member.network)
        if member.start is None:
            trunk = {k.removeprefix("trunk."): v for k, v in self._start.items() if k.startswith("trunk.")}
            load_weights(network.trunk, member.architecture, trunk)
        else:
            load_weights(network, member.architecture, self._start)
        left_out = member.data.left_out
        indices = self.packed.training_indices(-1 if left_out is None else left_out)
        columns = self.packed.columns
        return Run(member, network, columns["labels"], columns["sources"], indices, self.machine)

    def batches(
        self, draws: Labels, member: Recipe, epoch: int, stage: Stage
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The draws' views in batches of the member's size, the remainder dropped."""
        size = member.optimiser.batch_size
        whole = len(draws) - len(draws) % size
        first, at_once = (size * max(1, count // size) for count in (_FIRST, _AT_ONCE))
        begins = [0, *range(first, whole, at_once), whole]

        def made(place: int) -> tuple[Tensor, Tensor]:
            rows = draws[begins[place] : begins[place + 1]]
            rng = np.random.default_rng((member.seed, epoch, begins[place]))
            return self.views.views(rows, stage.side, stage, rng), self._labels[self.views.tensor(rows)]

        places = range(len(begins) - 1 if whole else 0)
        for views, labels in self.machine.ahead(made, places):
            for begin in range(0, len(views), size):
                batch = slice(begin, begin + size)
                yield views[batch].permute(0, 2, 3, 1), labels[batch]

    def train_epoch(self, run: Run, epoch: int, turn: Turn) -> dict[str, float]:
        """One epoch of a member; returns its line of the log."""
        stage = run.recipe.stages[turn.stage]
        return run.epoch(epoch, lambda draws: self.batches(draws, run.recipe, epoch, stage), turn=turn)


def next_turn(stages: tuple[Stage, ...], spent: float, round_share: float) -> Turn | None:
    """The next round, when `spent` of the time is over and the last round took `round_share` of it.

    None where that is not enough for another; the last one ends with the time, and its learning rate at zero.
    """
    if spent and spent + round_share > 1.0:
        return None
    after = 1.0 if spent + 2.0 * round_share > 1.0 else spent + round_share
    ends = np.cumsum([stage.epochs for stage in stages]) / sum(stage.epochs for stage in stages)
    return Turn(min(int(np.searchsorted(ends, spent, "right")), len(stages) - 1), spent, after)


def in_batches(recipe: Recipe, size: int) -> Recipe:
    """The recipe in batches of another size: see the module."""
    plan, ratio = recipe.optimiser, size / recipe.optimiser.batch_size
    scaled = replace(
        plan,
        batch_size=size,
        trunk_lr=plan.trunk_lr * ratio**0.5,
        head_lr=plan.head_lr * ratio**0.5,
        ema_decay=plan.ema_decay**ratio,
    )
    return replace(recipe, optimiser=scaled)


def write_members(runs: dict[int, Run], output: Path) -> None:
    """The averaged weights of every member, all or none."""
    pending = output / "next"
    pending.mkdir(exist_ok=True)
    names = {fold: f"member-{fold}.safetensors" for fold in runs}
    for fold, run in runs.items():
        write_weights(run.ema, pending / names[fold])
    for name in names.values():
        (pending / name).rename(output / name)
    pending.rmdir()


@torch.inference_mode()
def check(recipe: Recipe, weights: Path, pixels: Tensor, machine: Machine) -> dict[str, Any]:
    """Written weights on the device against the CPU, on float images N×3×side×side, and how long a pass takes.

    `exact` is float32 without TF32, `trained` the precision of training; differences are of logits.
    """
    network = DermNetwork(recipe.architecture, recipe.network).eval()
    load_weights(
        network,
        recipe.architecture,
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(weights).items()},
    )
    expected = network(pixels.cpu())[0]
    kind, times = machine.device.type, 30 if machine.device.type == "cuda" else 3
    latency = {"cpu_1": _milliseconds(lambda: network(pixels[:1].cpu()), 3)}
    network.to(machine.device, memory_format=torch.channels_last)
    moved = pixels.to(machine.device)
    exact = network(moved)[0].cpu()
    for count in (1, 32):
        latency[f"{kind}_{count}"] = _milliseconds(lambda n=count: network(moved[:n]), times)
    with machine.autocast():
        trained = network(moved)[0].float().cpu()
        latency[f"{kind}_32_trained"] = _milliseconds(lambda: network(moved[:32]), times)
    found: dict[str, Any] = {"images": len(pixels), "latency_ms": latency}
    for name, logits in (("exact", exact), ("trained", trained)):
        found[name] = {
            "max_difference": float((logits - expected).abs().max()),
            "same_first_answer": float((logits.argmax(1) == expected.argmax(1)).float().mean()),
        }
    return found


def _milliseconds(compute: Any, times: int) -> float:  # noqa: ANN401 - any call
    """Median of a call's time, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        compute()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(taken[1:]), 3)


def train_members(
    trainer: Trainer, members: tuple[int, ...], output: Path, seconds: float, began: float
) -> dict[str, Any]:
    """Train and check; returns what `run.json` holds. `seconds`: in all, from `began` (monotonic)."""
    output.mkdir(parents=True, exist_ok=True)
    recipe, machine = trainer.recipe, trainer.machine
    shares = recipe.stages
    recipe = replace(recipe, stages=tuple(replace(stage, epochs=1) for stage in shares))
    runs = {fold: trainer.run(recipe.member(fold)) for fold in members}
    if not all(steps for run in runs.values() for steps in run.steps):
        raise ValueError("An epoch of this recipe holds less than one batch.")
    start = time.monotonic()
    whole = max(1e-3, began + seconds - _END_S - start)
    report: dict[str, Any] = {
        "device": _device_name(machine),
        "torch": torch.__version__,
        "members": members,
        "ready_s": round(start - began, 1),
        "stages": [asdict(stage) for stage in shares],
        "optimiser": asdict(recipe.optimiser),
        "rounds": [0] * len(shares),
    }

    def write() -> None:
        report["seconds"] = round(time.monotonic() - began, 1)
        (output / "run.partial").write_text(json.dumps(report, indent=1) + "\n")
        (output / "run.partial").rename(output / "run.json")

    spent, round_share = 0.0, _FIRST_SHARE
    while turn := next_turn(shares, spent, round_share):
        number = sum(report["rounds"])
        lines = [{"member": fold} | trainer.train_epoch(run, number, turn) for fold, run in runs.items()]
        write_members(runs, output)
        with (output / "log.jsonl").open("a") as log:
            log.writelines(json.dumps(line) + "\n" for line in lines)
        report["rounds"][turn.stage] += 1
        before, spent = spent, (time.monotonic() - start) / whole
        round_share = spent - before
        write()
        print(json.dumps(lines), flush=True)
    side = shares[-1].side
    pixels = trainer.views.images[0][:_CHECKED].permute(0, 3, 1, 2).float()
    pixels = functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0.0, 255.0)
    # The others are the same graph.
    report["checks"] = check(recipe, output / f"member-{members[0]}.safetensors", pixels, machine)
    write()
    return report


def _device_name(machine: Machine) -> str:
    return torch.cuda.get_device_name() if machine.device.type == "cuda" else "cpu"


def main() -> None:
    """Command line: see the module."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="the folder that `pack` wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="in all, from start to end")
    parser.add_argument(
        "--members", type=int, nargs="+", help="the folds left out (default: every training fold)"
    )
    parser.add_argument("--batch", type=int, help="images a batch (default: the recipe's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument(
        "--overlays", type=int, default=8192, help="how many drawings of clutter (default 8,192)"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    recipe = read_recipe(arguments.recipe)
    if arguments.batch:
        recipe = in_batches(recipe, arguments.batch)
    machine = Machine.of(arguments.device)
    # On an H100 measured kernels were no faster than those that cuDNN picks, and took twice as long to begin.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, False
    packed = PackedImages.read(arguments.parts)
    # Before the device is first used: its state does not outlive a fork.
    overlays = Overlays.drawn(arguments.overlays, packed.header.side, recipe.seed, os.cpu_count() or 1)
    trainer = Trainer(recipe, packed, arguments.parts / "start.safetensors", overlays, machine)
    members = tuple(arguments.members or recipe.data.train_folds)
    report = train_members(trainer, members, arguments.output, 60 * arguments.minutes, began)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""A run that was stopped goes on as if it had not been, and under no other recipe."""

from __future__ import annotations

from dataclasses import replace
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_jobs.training.plans import Stage
from data_jobs.training.recipe import read_recipe
from serve_app.domain.diagnosis import TRAINED

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

RECIPE = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite0_derm4.toml"))
RECIPE = replace(
    RECIPE,
    start=None,
    optimiser=replace(RECIPE.optimiser, batch_size=8),
    stages=(Stage(side=32, epochs=1), Stage(side=40, epochs=1)),
)


class StoppedError(Exception):
    """The process dies here."""


def drawn(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """24 images of noise, their labels, and that all are trained on."""
    pixels = rng.integers(0, 256, (24, 48, 48, 3), dtype=np.uint8)
    return pixels, np.arange(24) % len(TRAINED), np.arange(24)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch, *, bfloat16: bool
) -> None:
    from safetensors.torch import load_file

    from data_jobs.training import train as training
    from data_jobs.training.machine import Machine

    rng = np.random.default_rng(3)
    second = replace(RECIPE.stages[1], draws=16, bcn84=0.5, soft=0.5, clutter=0.5)
    arguments = (replace(RECIPE, stages=(RECIPE.stages[0], second)), *drawn(rng))
    machine = Machine.of("cpu", bfloat16=bfloat16)

    training.train(*arguments, tmp_path / "whole", machine=machine)

    real, begun = training.run_epoch, []

    def stopping(*given: object) -> tuple[float, float]:
        begun.append(1)
        if len(begun) == 2:
            raise StoppedError
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_epoch", stopping)
        with pytest.raises(StoppedError):
            training.train(*arguments, tmp_path / "stopped", machine=machine)
    training.train(*arguments, tmp_path / "stopped", machine=machine)

    whole, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "stopped")
    )
    assert stopped["epochs_done"] == whole["epochs_done"] == 2
    for part in ("network", "ema"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in stopped[part].items())
    for stage in (1, 2):
        weights = load_file(tmp_path / "stopped" / f"stage-{stage}.safetensors")
        assert weights["reduce.weight"].dtype == torch.float16
    averaged = {k.removeprefix("module."): v for k, v in whole["ema"].items() if k.startswith("module.")}
    assert weights.keys() == averaged.keys()
    assert all(
        torch.allclose(weights[k].float(), v.float(), rtol=1e-3, atol=1e-6) for k, v in averaged.items()
    )
    log = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["side"] for line in log] == [32, 40]
    assert all(np.isfinite(line["loss"]) and 0.0 <= line["train_accuracy"] <= 1.0 for line in log)


def test_a_run_goes_on_under_its_own_recipe_only(tmp_path: Path) -> None:
    from data_jobs.training.train import train

    begun = replace(RECIPE, stages=RECIPE.stages[:1])
    arguments = drawn(np.random.default_rng(3))
    train(begun, *arguments, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    before = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    assert state["recipe"] == begun.training_digest

    other = replace(begun, optimiser=replace(begun.optimiser, trunk_lr=1e-5))
    with pytest.raises(
        ValueError,
        match=f"under another recipe .{begun.training_digest[:12]}, not {other.training_digest[:12]}",
    ):
        train(other, *arguments, tmp_path)
    # What is asked of the model afterwards trains no other weights.
    train(replace(begun, serving_sides=(32,), acceptance=None), *arguments, tmp_path)
    assert checkpoint.read_bytes() == before

    del state["recipe"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="a recipe that it does not name"):
        train(begun, *arguments, tmp_path)


def test_a_gpu_is_fed_by_every_core() -> None:
    from data_jobs.training.machine import Machine

    assert (Machine.of("cpu").workers, Machine.of("cuda").workers) == (1, os.cpu_count())
    assert (Machine.of("cpu").bfloat16, Machine.of("cuda").bfloat16) == (False, True)
    assert (Machine.of("cpu", 3).workers, Machine.of("cuda", 0).workers) == (3, 0)


def test_a_run_may_augment_in_its_own_process(tmp_path: Path) -> None:
    from data_jobs.training.machine import Machine
    from data_jobs.training.train import train

    recipe, arguments = replace(RECIPE, stages=RECIPE.stages[:1]), drawn(np.random.default_rng(3))
    for workers in (0, 1):
        train(recipe, *arguments, tmp_path / str(workers), machine=Machine.of("cpu", workers))
    own, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["network"] for name in ("0", "1")
    )
    assert all(torch.equal(own[name], tensor) for name, tensor in other.items())

"""A run that was stopped goes on as if it had not been, under no other recipe; and a student learns from its teachers."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
from torch.optim.swa_utils import AveragedModel

from data_jobs.training import steps
from data_jobs.training.export import PixelsIn, export_weights, write_onnx
from data_jobs.training.loss import AdjustedLoss, Mixture
from data_jobs.training.machine import Machine
from data_jobs.training.network import DermNetwork
from data_jobs.training.recipe import DistillationPlan, LossPlan, Stage, TeacherPlan, read_recipe
from data_jobs.training.scan import open_onnx
from data_jobs.training.steps import learning_rate, write_weights
from data_jobs.training.teachers import Teachers
from data_jobs.training.train import train
from serve_app.domain.diagnosis import TRAINED

pytestmark = [
    pytest.mark.torch,
    # torch's own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

ENSEMBLE = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml"))
#: Small enough to train here.
RECIPE = replace(
    ENSEMBLE,
    architecture="tf_efficientnet_lite0",
    optimiser=replace(ENSEMBLE.optimiser, batch_size=8),
    stages=(Stage(side=32, epochs=1), Stage(side=40, epochs=1)),
)
SIDE = 48
PRIOR = np.arange(1.0, len(TRAINED) + 1.0) / 36.0


OWN = Machine.of("cpu", 0)


def drawn(count: int = 24) -> tuple[Any, Any, Any]:
    """Images of noise, their labels, and that all are trained on."""
    pixels = np.random.default_rng(3).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return pixels, np.arange(count) % len(TRAINED), np.arange(count)


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_learning_rate_warms_up_and_falls() -> None:
    assert [learning_rate(step, 100, 0.1) for step in (0, 10, 100)] == pytest.approx([0.1, 1.0, 0.0])


def test_a_stopped_run_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path, monkeypatch) -> None:
    second = replace(RECIPE.stages[1], draws=16, bcn84=0.5, soft=0.5, clutter=0.5)
    arguments = (replace(RECIPE, stages=(RECIPE.stages[0], second)), *drawn())
    machine = Machine.of("cpu", 0, bfloat16=True)

    train(*arguments, tmp_path / "whole", machine=machine)

    real, begun = steps.run_epoch, []

    class StoppedError(Exception):
        """The process dies here."""

    def stopping(*given: object) -> tuple[float, float]:
        begun.append(1)
        if len(begun) == 2:
            raise StoppedError
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "run_epoch", stopping)
        with pytest.raises(StoppedError):
            train(*arguments, tmp_path / "stopped", machine=machine)
    train(*arguments, tmp_path / "stopped", machine=machine)

    whole, stopped = (state_of(tmp_path / name) for name in ("whole", "stopped"))
    assert stopped["epochs_done"] == whole["epochs_done"] == 2
    for part in ("network", "ema"):
        assert all(torch.equal(whole[part][name], tensor) for name, tensor in stopped[part].items())
    averaged = {k.removeprefix("module."): v for k, v in whole["ema"].items() if k.startswith("module.")}
    assert (tmp_path / "stopped" / "stage-1.safetensors").exists()
    weights = safetensors.load_file(tmp_path / "stopped" / "stage-2.safetensors")
    assert weights["reduce.weight"].dtype == torch.float16
    assert weights.keys() == averaged.keys()
    assert all(
        torch.allclose(weights[k].float(), v.float(), rtol=1e-3, atol=1e-6) for k, v in averaged.items()
    )
    log = logged(tmp_path / "stopped")
    assert [line["side"] for line in log] == [32, 40]
    assert all(np.isfinite(line["loss"]) and 0.0 <= line["train_accuracy"] <= 1.0 for line in log)


def test_a_run_goes_on_under_its_own_recipe_only(tmp_path: Path) -> None:
    begun = replace(RECIPE, stages=RECIPE.stages[:1])
    arguments = drawn(8)
    train(begun, *arguments, tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    before = checkpoint.read_bytes()
    state = state_of(tmp_path)
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, each a network of seeded weights that does not answer evenly."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = DermNetwork("tf_efficientnet_lite0", RECIPE.network).eval()
        torch.nn.init.normal_(network.classify.weight, std=0.5)
        (folder / name).mkdir()
        write_onnx(PixelsIn(network), SIDE, folder / name / "model.onnx")
    return folder


def plan_of(models: Path, shares: dict[str, float], shift: float = 0.0) -> DistillationPlan:
    teachers = (
        TeacherPlan(name, sha256((models / name / "model.onnx").read_bytes()).hexdigest(), share, shift)
        for name, share in shares.items()
    )
    return DistillationPlan(SIDE, 0.8, tuple(teachers))


def test_teachers_answer_together_without_the_restored_prior_and_the_student_sees_what_they_see(
    models: Path,
) -> None:
    pixels = drawn(4)[0]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    first, second = (open_onnx(models / name / "model.onnx")(pixels)[0] for name in ("first", "second"))
    assert np.abs(first - second).max() > 0.1
    teachers = Teachers(plan_of(models, {"first": 0.3, "second": 0.7}, shift=0.4), models, PRIOR)
    expected = 0.3 * first + 0.7 * second - 0.4 * np.log(PRIOR)
    np.testing.assert_allclose(teachers.logits(images).numpy(), expected, atol=1e-4)
    labels = torch.zeros(4, dtype=torch.int64)
    for side in (SIDE, 32):
        (taught,) = teachers.teach(iter([Mixture(images, labels, labels, 1.0)]), side)
        assert taught.images.shape == (4, 3, side, side)
        np.testing.assert_allclose(taught.taught.numpy(), expected, atol=1e-4)
        torch.testing.assert_close(taught.images.mean((2, 3)), images.mean((2, 3)), atol=3.0, rtol=0.0)


def test_the_loss_is_least_where_the_student_answers_as_its_teachers() -> None:
    images, labels = torch.zeros(4, 3, 8, 8), torch.arange(4)
    taught = torch.randn(4, len(TRAINED), generator=torch.Generator().manual_seed(1))
    loss = AdjustedLoss(PRIOR, LossPlan(0.0, 1.0, 0.5), 1.0)
    student = taught.clone().requires_grad_()
    value = loss(student, Mixture(images, labels, labels, 1.0, taught))
    value.backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(taught), atol=1e-6, rtol=0.0)
    # What is left is the entropy of the teachers' own probabilities, under the prior that is sampled.
    p = (taught + 0.5 * torch.from_numpy(np.log(PRIOR)).float()).softmax(1)
    torch.testing.assert_close(value.detach(), -(p * p.log()).sum(1).mean())
    half = AdjustedLoss(PRIOR, LossPlan(0.0, 1.0, 0.5), 0.25)
    from_labels = half(student, Mixture(images, labels, labels, 1.0))
    torch.testing.assert_close(
        half(student, Mixture(images, labels, labels, 1.0, taught)), 0.75 * from_labels + 0.25 * value
    )


def test_a_student_comes_nearer_to_its_teachers_and_is_not_trained_without_them(
    models: Path, tmp_path: Path
) -> None:
    plan = replace(plan_of(models, {"first": 0.5, "second": 0.5}), loss_share=1.0)
    network = replace(RECIPE.network, dropout=0.0, drop_path=0.0)
    recipe = replace(RECIPE, network=network, distillation=plan, stages=(Stage(side=32, epochs=5),))
    train(recipe, *drawn(), tmp_path, machine=OWN, models=models)
    losses = [line["loss"] for line in logged(tmp_path)]
    assert len(losses) == 5
    assert min(losses[-2:]) < losses[0]
    with pytest.raises(ValueError, match=r"taught by first and second: .*--teachers"):
        train(recipe, *drawn(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"There is no .*model\.onnx: the recipe is taught by first"):
        Teachers(plan, tmp_path, PRIOR)
    wrong = replace(plan, teachers=(replace(plan.teachers[0], model_sha256="0" * 64), plan.teachers[1]))
    with pytest.raises(ValueError, match="SHA-256 is another"):
        Teachers(wrong, models, PRIOR)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_what_training_writes_is_what_is_exported_to_be_scored(tmp_path: Path) -> None:
    network = DermNetwork(RECIPE.architecture, RECIPE.network).eval()
    write_weights(AveragedModel(network), tmp_path / "stage-1.safetensors")
    export_weights(RECIPE, tmp_path / "stage-1.safetensors", list(range(8)), SIDE, tmp_path)
    pixels = drawn(3)[0]
    logits, bottleneck, *_ = open_onnx(tmp_path / "model.onnx")(pixels)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())[0].numpy()
    assert bottleneck.shape == (3, 512)
    assert logits == pytest.approx(expected, abs=0.02)
    with torch.no_grad():
        network.reduce.weight[0, 0] = 1e9
    with pytest.raises(ValueError, match="beyond what float16 can hold"):
        write_weights(AveragedModel(network), tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()

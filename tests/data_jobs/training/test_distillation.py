"""A student answers as its teachers do together, and only the teachers that its recipe names teach it."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.plans import DistillationPlan, LossPlan, Stage, TeacherPlan
from data_jobs.training.recipe import Recipe, read_recipe
from serve_app.domain.diagnosis import TRAINED

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

SIDE = 48
PRIOR = np.arange(1.0, len(TRAINED) + 1.0) / 36.0
STUDENT = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm8.toml"))
#: The student, small enough to train here.
SMALL = replace(
    STUDENT,
    start=None,
    network=replace(STUDENT.network, dropout=0.0, drop_path=0.0),
    optimiser=replace(STUDENT.optimiser, batch_size=8),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two model folders, each a network of seeded weights that does not answer evenly."""
    from data_jobs.training.export import write_onnx
    from data_jobs.training.network import DermNetwork

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        network = DermNetwork("tf_efficientnet_lite0", STUDENT.network).eval()
        torch.nn.init.normal_(network.classify.weight, std=0.5)
        (folder / name).mkdir()
        write_onnx(network, SIDE, folder / name / "model.onnx")
    return folder


def plan_of(models: Path, shares: dict[str, float], shift: float = 0.0) -> DistillationPlan:
    teachers = (
        TeacherPlan(name, sha256((models / name / "model.onnx").read_bytes()).hexdigest(), share, shift)
        for name, share in shares.items()
    )
    return DistillationPlan(SIDE, 0.8, tuple(teachers))


def drawn_images(count: int = 4):
    pixels = np.random.default_rng(5).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return pixels, torch.from_numpy(pixels).permute(0, 3, 1, 2).float()


def test_their_answer_is_the_weighted_mean_without_the_restored_prior(models: Path) -> None:
    from data_jobs.training.distillation import Teachers
    from data_jobs.training.scan import open_onnx

    pixels, images = drawn_images()
    first, second = (open_onnx(models / name / "model.onnx")(pixels)[0] for name in ("first", "second"))
    expected = 0.3 * first + 0.7 * second - 0.4 * np.log(PRIOR)
    found = Teachers(plan_of(models, {"first": 0.3, "second": 0.7}, shift=0.4), models, PRIOR).logits(images)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


def test_the_student_sees_what_they_see_at_its_own_size(models: Path) -> None:
    from data_jobs.training.distillation import Teachers
    from data_jobs.training.loss import Mixture

    _, images = drawn_images()
    labels = torch.zeros(4, dtype=torch.int64)
    teachers = Teachers(plan_of(models, {"first": 1.0}), models, PRIOR)
    for side in (SIDE, 32):
        (taught,) = teachers.teach(iter([Mixture(images, labels, labels, 1.0)]), side)
        assert taught.images.shape == (4, 3, side, side)
        torch.testing.assert_close(taught.taught, teachers.logits(images))
        torch.testing.assert_close(taught.images.mean((2, 3)), images.mean((2, 3)), atol=3.0, rtol=0.0)


def test_the_loss_is_least_where_the_student_answers_as_its_teachers() -> None:
    from data_jobs.training.loss import AdjustedLoss, Mixture

    _, images = drawn_images()
    labels = torch.arange(4)
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


def test_a_student_comes_nearer_to_its_teachers(models: Path, tmp_path: Path) -> None:
    from data_jobs.training.train import train

    pixels = np.random.default_rng(3).integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    labels = np.arange(24) % len(TRAINED)
    recipe = replace(
        SMALL,
        distillation=replace(plan_of(models, {"first": 0.5, "second": 0.5}), loss_share=1.0),
        stages=(Stage(side=32, epochs=8),),
    )
    train(recipe, pixels, labels, np.arange(24), tmp_path, models=models)
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in (tmp_path / "log.jsonl").open()]
    assert len(losses) == 8
    assert min(losses[-2:]) < losses[0]


def test_without_its_teachers_it_is_not_trained(models: Path, tmp_path: Path) -> None:
    from data_jobs.training.distillation import Teachers
    from data_jobs.training.train import train

    plan = plan_of(models, {"first": 0.3, "second": 0.7})
    recipe = replace(SMALL, distillation=plan)
    pixels = np.zeros((8, SIDE, SIDE, 3), np.uint8)
    with pytest.raises(ValueError, match=r"taught by first and second: .*--teachers"):
        train(recipe, pixels, np.arange(8), np.arange(8), tmp_path / "run")
    with pytest.raises(ValueError, match=r"There is no .*model\.onnx: the recipe is taught by first"):
        Teachers(plan, tmp_path, PRIOR)
    wrong = replace(plan, teachers=(replace(plan.teachers[0], model_sha256="0" * 64), plan.teachers[1]))
    with pytest.raises(ValueError, match="SHA-256 is another"):
        Teachers(wrong, models, PRIOR)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_who_teaches_shapes_the_digest() -> None:
    def digest(plan: DistillationPlan | None) -> str:
        recipe: Recipe = replace(STUDENT, distillation=plan)
        return recipe.training_digest

    plan = STUDENT.distillation
    assert plan is not None
    assert plan.side >= max(STUDENT.epoch_sides)
    others = (None, replace(plan, loss_share=0.5), replace(plan, teachers=plan.teachers[::-1]))
    assert STUDENT.training_digest not in {digest(other) for other in others}

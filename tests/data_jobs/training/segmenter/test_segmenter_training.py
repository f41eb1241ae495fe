"""The segmenter's run goes on where it stopped, learns from its folds alone, and is served as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
import pytest
from safetensors.torch import load_file, save_file
import torch

from data_jobs.training.dataset import LabelledImage
from data_jobs.training.machine import Machine
from data_jobs.training.network import DermNetwork
from data_jobs.training.recipe import NetworkPlan, Stage
from data_jobs.training.segmenter.build import read_network, write_graph
from data_jobs.training.segmenter.evaluate import (
    Scored,
    blue_otsu,
    iou_figures,
    least_confidence,
    overlap,
    touching,
)
from data_jobs.training.segmenter.masks import is_cropped, mask_path, outlined, read_mask
from data_jobs.training.segmenter.network import SegmenterNetwork, load_classifier, outline_loss
from data_jobs.training.segmenter.recipe import SegmenterRecipe, read_segmenter_recipe
from data_jobs.training.segmenter.train import drawn, train
from deployments.change.segmenter import Outline, OutlineDoubt

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

PATH = Path("data_jobs/training/recipes/tf_efficientnet_lite0_fpn_seg1.toml")
SHIPPED = read_segmenter_recipe(PATH)
OWN = Machine.of("cpu", 0)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmenterRecipe, Path]:
    """A checkpoint of an untrained classifier, and a short recipe that starts from it."""
    path = tmp_path_factory.mktemp("start") / "checkpoint.pt"
    torch.manual_seed(1)
    network = DermNetwork(SHIPPED.trunk, NetworkPlan(0.5, 0.5, 0.0, 0.0, 0))
    torch.save({"ema": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    stages = (Stage(32, 1, draws=8, clutter=0.5), Stage(48, 1, draws=8))
    plan = replace(SHIPPED.optimiser, batch_size=4)
    made = replace(SHIPPED.start, checkpoint_sha256=digest)
    return replace(SHIPPED, start=made, stages=stages, optimiser=plan), path


def lesions(count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Pale noise with a dark square each, and the squares."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(150, 256, (count, 64, 64, 3), dtype=np.uint8)
    masks = np.zeros((count, 64, 64), np.uint8)
    for i in range(count):
        masks[i, 10 + i : 40, 12 : 44 - i] = 255
    pixels[masks > 0] //= 3
    return pixels, masks


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    start: tuple[SegmenterRecipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, checkpoint = start
    train(recipe, *lesions(), tmp_path / "whole", checkpoint, OWN)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_jobs.training.segmenter.train.print", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, *lesions(), tmp_path / "stopped", checkpoint, OWN)
    train(recipe, *lesions(), tmp_path / "stopped", checkpoint, OWN)
    whole, stopped = (load_file(tmp_path / name / "stage-2.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, stopped[name]) for name, value in whole.items())
    log = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [line["side"] for line in log] == [32, 48]
    with pytest.raises(ValueError, match="another recipe"):
        train(replace(recipe, seed=1), *lesions(), tmp_path / "stopped", checkpoint, OWN)
    # At which side it is served shapes no weight.
    train(replace(recipe, side=192), *lesions(), tmp_path / "stopped", checkpoint, OWN)


def test_what_it_starts_from_is_what_the_recipe_names(
    start: tuple[SegmenterRecipe, Path], tmp_path: Path
) -> None:
    _, checkpoint = start
    with pytest.raises(ValueError, match="SHA-256"):
        train(SHIPPED, *lesions(), tmp_path, checkpoint, OWN)
    network = SegmenterNetwork(SHIPPED.trunk, SHIPPED.network)
    with pytest.raises(ValueError, match="not the weights"):
        load_classifier(network, SHIPPED.trunk, {"trunk.bn1.weight": torch.ones(3)})


def test_frozen_groups_stay_and_the_rest_learns(start: tuple[SegmenterRecipe, Path], tmp_path: Path) -> None:
    recipe, checkpoint = start
    train(recipe, *lesions(), tmp_path, checkpoint, OWN)
    before = torch.load(checkpoint, weights_only=True)["ema"]
    after = load_file(tmp_path / "stage-2.safetensors")
    same = {
        name
        for name, value in after.items()
        if torch.equal(value, before.get(f"module.{name}", value).half())
    }
    frozen = {f"trunk.blocks.{group}." for group in range(recipe.network.frozen_groups)}
    assert {n for n in after if any(n.startswith(f) for f in frozen) and "num_batches" not in n} <= same
    assert "trunk.blocks.4.0.conv_dw.weight" not in same
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize(
    ("line", "to", "named"),
    [
        ("calibration_fold = 4", "calibration_fold = 1", "must differ"),
        ("calibration_fold = 4", "calibration_fold = 0", "must differ"),
        ("seen_folds = [1, 2, 3]", "seen_folds = [0, 1]", "must differ"),
        ("channels = 48", "chanels = 48", "chanels"),
        ("frozen_groups = 2\n", "", "frozen_groups"),
    ],
)
def test_a_recipe_that_leaks_or_errs_is_refused(tmp_path: Path, line: str, to: str, named: str) -> None:
    text = PATH.read_text()
    assert line in text
    (tmp_path / "recipe.toml").write_text(text.replace(line, to))
    with pytest.raises(ValueError, match=named):
        read_segmenter_recipe(tmp_path / "recipe.toml")


def test_no_image_comes_again_before_all_have() -> None:
    draws = drawn(7, 17, np.random.default_rng(0))
    assert len(draws) == 17
    assert sorted(draws[:7]) == sorted(draws[7:14]) == list(range(7))


def test_the_loss_is_least_where_the_outline_is_right() -> None:
    masks = torch.zeros(2, 1, 16, 16)
    masks[:, :, 4:10, 5:12] = 1.0
    right = 12.0 * (2.0 * masks - 1.0)
    losses = [
        float(outline_loss(logits, masks)) for logits in (right, 0.2 * right, torch.zeros_like(right), -right)
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.01


def test_the_served_graph_answers_as_torch_does_and_is_small(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = SegmenterNetwork(SHIPPED.trunk, SHIPPED.network)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    served = read_network(SHIPPED, tmp_path / "weights.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    assert write_graph(served, 64, tmp_path / "model.onnx", pixels) < 0.01
    assert (tmp_path / "model.onnx").stat().st_size < 3_000_000


def test_masks_are_read_into_the_frame_of_their_images(
    tmp_path: Path, make_row: Callable[..., LabelledImage]
) -> None:
    cropped = make_row(1)
    squashed = replace(cropped, width=180, height=180)
    mask = Image.new("L", (200, 150))
    mask.paste(255, (50, 30, 100, 90))
    (tmp_path / "masks").mkdir()
    mask.save(mask_path(cropped, tmp_path))
    assert outlined([make_row(0), cropped], tmp_path).tolist() == [1]
    inside = read_mask(squashed, tmp_path, 100) > 127
    assert inside.sum() == 25 * 40
    assert inside[20:60, 25:50].all()
    # The archive has only the middle square of it: 25 to 175 of 200.
    inside = read_mask(cropped, tmp_path, 150) > 127
    assert inside.sum() == 50 * 60
    assert inside[30:90, 25:75].all()
    assert not is_cropped(replace(cropped, aspect="true"))


def test_figures_count_what_they_say() -> None:
    left, right = np.zeros((2, 10, 10), np.bool_)
    assert overlap(left, right) == 1.0
    left[:, :6], right[:, 4:] = True, True
    assert overlap(left, right) == 0.2
    assert touching(np.stack([left, np.zeros_like(left)])).tolist() == [True, False]
    figures = iou_figures(np.array([0.9, 0.8, 0.4, 0.7]), ["a", "a", "b", "c"], 1)
    assert (figures["mean_iou"], figures["passed"], figures["thresholded_iou"]) == (0.7, 0.75, 0.6)
    assert figures["mean_iou_interval"][0] < 0.7 < figures["mean_iou_interval"][1]


def test_the_least_confidence_makes_sure_outlines_reliable() -> None:
    confidence = np.linspace(0.4, 1.0, 601)
    iou = np.where(confidence < 0.7, 0.5, 0.9)
    nothing = np.zeros((0, 0), np.bool_)

    def scored(*doubts: OutlineDoubt) -> Scored:
        return Scored(tuple(Outline(nothing, float(c), 0.0, 1.0, doubts) for c in confidence), iou)

    # A few that failed are allowed, but not many: 3 % at most, with 95 % confidence.
    assert 0.68 <= least_confidence(scored()) <= 0.70
    with pytest.raises(ValueError, match="more training"):
        least_confidence(scored(OutlineDoubt.TOUCHES_FRAME))


def test_the_baseline_finds_a_dark_lesion() -> None:
    pixels = np.full((224, 224, 3), 200, np.uint8)
    truth = np.zeros((224, 224), np.bool_)
    truth[70:150, 80:170] = True
    pixels[truth] = 60
    pixels[:20, :20] = 60
    assert overlap(blue_otsu(pixels), truth) > 0.9

"""What a network starts from, what it becomes as ONNX, and what an epoch draws."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors
import timm
import torch

from data_jobs.promotion.source import MAX_LOGIT_DIFFERENCE
from data_jobs.training.draws import class_counts, draw_epoch
from data_jobs.training.ensemble_network import UnknownScore
from data_jobs.training.export import PixelsIn, export_weights, onnx_parity, write_onnx
from data_jobs.training.network import (
    DermNetwork,
    averaged_weights,
    load_imagenet,
    load_start,
    wheel_weights,
)
from data_jobs.training.outliers import CLINICAL
from data_jobs.training.recipe import Recipe, Stage, StartPlan, WeightsPlan, read_recipe
from data_jobs.training.scan import open_onnx
from data_jobs.training.unknown import Examples, fit_head
from tests.model_folders import RECIPES

pytestmark = [
    pytest.mark.torch,
    # torch's ONNX tracer and its own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

RECIPE = replace(read_recipe(RECIPES / "tf_efficientnet_lite0_derm7.toml"), start=None)
OTHER = read_recipe(RECIPES / "mobilenetv3_large_100.toml")


@pytest.mark.parametrize(
    ("architecture", "tensors"), [("tf_efficientnet_lite0", 296), ("tf_efficientnet_lite2", 386)]
)
def test_a_wheel_maps_onto_its_trunk(architecture: str, tensors: int) -> None:
    network = DermNetwork(architecture, RECIPE.network)
    weights = wheel_weights(architecture)
    assert load_imagenet(network, weights) == tensors
    assert torch.equal(network.trunk.conv_stem.weight, next(iter(weights.values())))
    with pytest.raises(ValueError, match=f"{tensors - 1} tensors"):
        load_imagenet(network, dict(list(weights.items())[1:]))
    swapped = list(weights.items())
    swapped[0], swapped[1] = swapped[1], swapped[0]
    with pytest.raises(ValueError, match="shape"):
        load_imagenet(network, dict(swapped))


def test_frozen_parts_stay_as_they_are() -> None:
    torch.manual_seed(1)
    network = DermNetwork(RECIPE.architecture, replace(RECIPE.network, frozen_groups=2)).train()
    before = network.trunk.bn1.running_mean.clone()
    logits, _ = network(torch.rand(4, 3, 32, 32) * 255.0)
    logits.sum().backward()
    assert torch.equal(network.trunk.bn1.running_mean, before)
    assert network.trunk.blocks[1][0].conv_pw.weight.grad is None
    assert network.trunk.blocks[2][0].conv_pw.weight.grad is not None


def test_the_unknown_score_is_told_in_the_graph(tmp_path: Path) -> None:
    import onnxruntime as ort

    torch.manual_seed(3)
    network = DermNetwork(RECIPE.architecture, RECIPE.network).eval()
    pixels = torch.rand(12, 3, 64, 64) * 255.0
    with torch.inference_mode():
        logits, bottleneck, measures = network.measure(pixels)
        for told, expected in zip((logits, bottleneck), network(pixels), strict=True):
            torch.testing.assert_close(told, expected)
    assert measures.shape == (12, 2 * sum(level["num_chs"] for level in network.trunk.feature_info))
    rng = np.random.default_rng(3)
    near, far = (measures.numpy().repeat(5, 0) * rng.uniform(0.7, 1.3, (60, 1)) for _ in range(2))
    kinds, groups = np.full(60, CLINICAL), np.arange(60).astype(str)
    head = fit_head(Examples(near, kinds, groups), Examples(far * 2.0, kinds, groups))

    class Told(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.unknown = network, UnknownScore(head)

        def forward(self, x):
            return self.unknown(self.network.measure(x)[2])

    path = str(tmp_path / "model.onnx")
    axes = {"pixels": {0: "batch"}}
    torch.onnx.export(
        Told().eval(),
        (pixels[:2],),
        path,
        input_names=["pixels"],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )
    (told,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"pixels": pixels.numpy()}
    )
    assert told.shape == (12,)
    np.testing.assert_allclose(told, head.score(measures.numpy()), rtol=2e-3, atol=2e-2)


def test_onnx_answers_as_torch_does(tmp_path: Path) -> None:
    torch.manual_seed(2)
    network = DermNetwork(OTHER.architecture, OTHER.network).eval()
    # Mean and std are the recipe's, one a channel, and no part of a checkpoint.
    assert not {"mean", "std"} & set(network.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (OTHER.network.mean, OTHER.network.std))
    reduced = network.normalise(network.reduce(network.trunk((images - mean) / std)))
    assert torch.allclose(network(images)[1], reduced, atol=1e-5)

    served = PixelsIn(network)
    write_onnx(served, 64, tmp_path / "model.onnx")
    pixels = np.random.default_rng(2).integers(0, 256, (5, 64, 64, 3)).astype(np.uint8)
    parity = onnx_parity(served, tmp_path / "model.onnx", pixels)
    assert parity["max_abs_logit"] < 1e-4
    assert parity["max_abs_bottleneck"] < 1e-3
    logits, bottleneck, *_ = open_onnx(tmp_path / "model.onnx")(pixels[:1])
    assert (logits.shape, bottleneck.shape) == ((1, 8), (1, 512))
    assert (logits.dtype, bottleneck.dtype) == (np.float32, np.float32)


def test_a_timm_checkpoint_keeps_the_logits_of_the_eight(tmp_path: Path) -> None:
    checkpoint = timm.create_model(OTHER.architecture, num_classes=11).state_dict()
    safetensors.save_file(checkpoint, tmp_path / "timm.safetensors")
    positions = [7, 8, 1, 0, 3, 4, 10, 9]  # of the eight among eleven, in an order that is not ours
    report = export_weights(OTHER, tmp_path / "timm.safetensors", positions, 64, tmp_path)
    assert report["parity"]["max_abs_logit"] < MAX_LOGIT_DIFFERENCE
    assert report["max_abs_logit_of_timm"] < MAX_LOGIT_DIFFERENCE


def test_neither_hospital_nor_softness_tells_the_class() -> None:
    """Every class has the other hospital's share, also one that there are too few images of to be drawn in full."""
    labels = np.repeat(np.arange(8), 2 * np.array([200, 900, 60, 10, 40, 20, 20, 30]))
    sources = np.random.default_rng(1).permutation(np.arange(len(labels)) % 4 == 0).astype(np.int64)
    sources[labels == 7] = 0
    counts = class_counts(labels, sources, 0.3, Stage(64, 1, bcn84=0.4, repeats=2), 1500)
    shares = counts[:7, 1] / counts[:7].sum(1)
    assert shares == pytest.approx(0.4, abs=0.02)
    assert tuple(counts[7] > 0) == (True, False), "a class without such images is drawn from the others"
    draws = draw_epoch(labels, sources, np.arange(len(labels)), counts, np.random.default_rng(2))
    assert np.bincount(draws).max() == 2
    found = np.zeros_like(counts)
    np.add.at(found, (labels[draws], sources[draws]), 1)
    assert np.array_equal(found, counts)


def start(recipe: Recipe, given: Path | None) -> DermNetwork:
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe, given)
    return network


def naming(path: Path) -> Recipe:
    return replace(OTHER, weights=WeightsPlan("timm.safetensors", sha256(path.read_bytes()).hexdigest()))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's own network with its 1000-class head, seeded instead of trained."""
    path = tmp_path_factory.mktemp("timm") / "timm.safetensors"
    torch.manual_seed(4)
    safetensors.save_file(timm.create_model(OTHER.architecture, num_classes=1000).state_dict(), path)
    return path


def test_training_starts_from_the_averaged_weights_that_the_recipe_names(tmp_path: Path) -> None:
    from torch.optim.swa_utils import AveragedModel

    earlier = AveragedModel(DermNetwork(RECIPE.architecture, RECIPE.network), use_buffers=True)
    checkpoint = tmp_path / "checkpoint.pt"
    torch.save({"ema": earlier.state_dict()}, checkpoint)
    assert averaged_weights(checkpoint).keys() == earlier.module.state_dict().keys()
    plan = StartPlan("m.one", sha256(checkpoint.read_bytes()).hexdigest())
    network = start(replace(RECIPE, start=plan), checkpoint)
    for mine, theirs in zip(network.parameters(), earlier.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="--start"):
        start(replace(RECIPE, start=plan), None)
    with pytest.raises(ValueError, match="not the checkpoint"):
        start(replace(RECIPE, start=StartPlan("m.one", "0" * 64)), checkpoint)


def test_the_trunk_is_timms_and_the_head_is_not(weights: Path) -> None:
    state = safetensors.load_file(weights)
    network = start(naming(weights), weights)
    trunk = network.trunk.state_dict()
    assert set(state) - set(trunk) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in trunk.items())


def test_another_file_or_none_is_refused(weights: Path, tmp_path: Path) -> None:
    recipe = naming(weights)
    with pytest.raises(
        ValueError, match=r"starts from timm's timm\.safetensors: give that file with --start"
    ):
        start(recipe, None)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other = tmp_path / "other.safetensors"
    other.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not timm's timm\.safetensors that the recipe names"):
        start(recipe, other)
    with pytest.raises(ValueError, match=r"No weights of mobilenetv3_large_100 are installed.*\[weights\]"):
        start(OTHER, None)
    with pytest.raises(ValueError, match="names nothing to start from"):
        start(RECIPE, weights)


def test_what_is_no_safetensors_or_of_another_network_is_refused(weights: Path, tmp_path: Path) -> None:
    state = safetensors.load_file(weights)
    head = state["conv_head.weight"]
    path = tmp_path / "changed.safetensors"
    for changed in (
        {name: tensor for name, tensor in state.items() if tensor is not head},
        state | {"conv_tail.weight": torch.zeros(3)},
        state | {"conv_head.weight": torch.zeros(3, 3)},
    ):
        safetensors.save_file(changed, path)
        with pytest.raises(ValueError, match="not the weights of mobilenetv3_large_100"):
            start(naming(path), path)
    torch.save({"conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        start(naming(path), path)

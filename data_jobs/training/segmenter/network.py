"""The network: the first block groups of a trunk of ours, and a light decoder in the manner of a feature pyramid.

The maps of the four resolutions (1/2 to 1/16 of the frame) are made equally wide and added from the coarsest to the
finest (Lin et al., "Feature Pyramid Networks", CVPR 2017); the mean over the frame joins the coarsest, so that the
whole frame is known everywhere (Liu et al., "ParseNet", 2015). The last block groups, three quarters of the trunk's
weights, are left out: an outline needs none of their resolution, and the file stays small.
"""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_jobs.training.network import load_weights
from data_jobs.training.segmenter.recipe import OutlinePlan


class SegmenterNetwork(nn.Module):
    """Pixels 0-255, float N×3×S×S, to logits of "lesion" N×1×S/2×S/2."""

    def __init__(self, trunk: str, plan: OutlinePlan) -> None:
        super().__init__()
        whole = timm.create_model(trunk, pretrained=False, num_classes=0)
        # Under the names that the classifier's checkpoints have.
        self.trunk = nn.ModuleDict(
            {"conv_stem": whole.conv_stem, "bn1": whole.bn1, "blocks": whole.blocks[: plan.trunk_groups]}
        )
        levels = [(info["stage"], info["num_chs"]) for info in whole.feature_info]
        # `stage` counts from 1: the group whose output has this resolution.
        self.taps = [stage - 1 for stage, _ in levels if 0 < stage <= plan.trunk_groups]
        widths = [whole_width for stage, whole_width in levels if 0 < stage <= plan.trunk_groups]
        outs = [plan.fine_channels, *[plan.channels] * (len(widths) - 1)]
        self.lateral = nn.ModuleList(
            nn.Conv2d(width, out, 1) for width, out in zip(widths, outs, strict=True)
        )
        self.context = nn.Conv2d(widths[-1], plan.channels, 1)
        self.smooth = nn.ModuleList(_smooth(out, outs[max(0, level - 1)]) for level, out in enumerate(outs))
        self.classify = nn.Conv2d(plan.fine_channels, 1, 1)
        self.frozen_groups = plan.frozen_groups
        self.mean, self.std = 255.0 * plan.mean, 255.0 * plan.std
        for module in self._frozen():
            module.requires_grad_(requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """One pass."""
        maps: list[Tensor] = []
        x = self.trunk["bn1"](self.trunk["conv_stem"]((pixels - self.mean) / self.std))
        for group, blocks in enumerate(self.trunk["blocks"]):
            x = blocks(x)
            if group in self.taps:
                maps.append(x)
        found = self.lateral[-1](maps[-1]) + self.context(maps[-1].mean((2, 3), keepdim=True))
        for level in range(len(maps) - 1, 0, -1):
            wider = functional.interpolate(self.smooth[level](found), scale_factor=2, mode="bilinear")
            found = wider + self.lateral[level - 1](maps[level - 1])
        logits: Tensor = self.classify(self.smooth[0](found))
        return logits

    def train(self, mode: bool = True) -> SegmenterNetwork:  # noqa: FBT001, FBT002 - torch's signature
        """As nn.Module's, but frozen parts keep their statistics."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        trunk = self.trunk
        return [trunk["conv_stem"], trunk["bn1"], *trunk["blocks"][: self.frozen_groups]]


def _smooth(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU6())


def load_classifier(network: SegmenterNetwork, trunk: str, weights: Mapping[str, Tensor]) -> None:
    """Give the trunk a classifier's weights, of which the network has the first groups; ValueError as `load_weights`."""
    named = {
        name.removeprefix("trunk."): value for name, value in weights.items() if name.startswith("trunk.")
    }
    wanted = network.trunk.state_dict()
    load_weights(network.trunk, trunk, {name: value for name, value in named.items() if name in wanted})


def outline_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy and one minus the soft Dice coefficient of each image, in equal parts; masks N×1×H×W, 0 to 1.

    Dice with squares in its denominator (Milletari et al., "V-Net", 2016) is 1 at equal soft masks, too.
    """
    p = torch.sigmoid(logits)
    overlap = 2.0 * (p * masks).sum((1, 2, 3))
    dice = (overlap + 1.0) / ((p * p + masks * masks).sum((1, 2, 3)) + 1.0)
    return functional.binary_cross_entropy_with_logits(logits, masks) + (1.0 - dice).mean()

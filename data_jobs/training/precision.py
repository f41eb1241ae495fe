"""bfloat16 on a CPU whose matrix units compute in it (AMX), without its one slow step.

oneDNN has no fast bfloat16 gradient of a depthwise convolution: on Lite2 at 160 px it takes three quarters of
a training step. That gradient alone is computed in float32 here; docs/models.md has what it gains.
"""

from __future__ import annotations

from timm.layers import Conv2dSame, pad_same
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

Size = tuple[int, ...]


class _Context(FunctionCtx):
    """What a step remembers for its gradient."""

    saved_tensors: tuple[Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    stride: Size
    padding: Size


class _DepthwiseGradient(torch.autograd.Function):
    """A depthwise convolution in bfloat16 whose gradient is computed in float32."""

    @staticmethod
    def forward(ctx: _Context, images: Tensor, weight: Tensor, stride: Size, padding: Size) -> Tensor:
        images = images.bfloat16()
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(images, weight.bfloat16(), None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], False)
        of_images, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient.float(),
            images.float(),
            weight,
            None,
            ctx.stride,
            ctx.padding,
            (1, 1),
            False,  # noqa: FBT003 - torch's signature: not transposed
            (0, 0),
            len(weight),
            wanted,
        )
        return (None if of_images is None else of_images.bfloat16()), of_weight, None, None


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution in place of `other`, with its weights: faster where autocast is on, else the same."""

    def __init__(self, other: nn.Conv2d) -> None:
        super().__init__(
            other.in_channels,
            other.out_channels,
            other.kernel_size,
            other.stride,
            other.padding,
            groups=other.groups,
            bias=False,
        )
        self.weight = other.weight
        self.pads_same = isinstance(other, Conv2dSame)

    def forward(self, images: Tensor) -> Tensor:
        """N×C×H×W to N×C×H'×W', in bfloat16 under autocast."""
        if self.pads_same:
            images = pad_same(images, self.kernel_size, self.stride)
        if not torch.is_autocast_enabled(images.device.type):
            return self._conv_forward(images, self.weight, None)
        output: Tensor = _DepthwiseGradient.apply(images, self.weight, self.stride, self.padding)
        return output


def speed_up_depthwise(network: nn.Module) -> int:
    """Exchange the network's depthwise convolutions for `DepthwiseConv2d`; returns how many there were.

    The names and values of its tensors stay what they are.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Conv2d) and child.groups == child.in_channels == child.out_channels > 1
    ]
    for parent, name, child in found:
        if child.bias is not None or child.dilation != (1, 1) or isinstance(child.padding, str):
            raise ValueError(f"{name}: a depthwise convolution with bias, dilation or named padding.")
        setattr(parent, name, DepthwiseConv2d(child))
    return len(found)

"""Where a run computes: the device, its memory layout and precision, and the processes that feed it.

bfloat16 pays on a CPU whose matrix units compute in it (AMX), but for one step: oneDNN has no fast bfloat16 gradient
of a depthwise convolution, which on Lite2 at 160 px takes three quarters of a training step. That gradient alone is
computed in float32 here; docs/models.md has what it gains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
import os
from typing import Any, TypeVar

from timm.layers import Conv2dSame, pad_same
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from data_jobs.training.recipe import OptimiserPlan

Size = tuple[int, ...]
Item = TypeVar("Item")


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


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run computes, how many processes augment for it (0: its own does), and whether in bfloat16."""

    device: torch.device
    workers: int = 1
    bfloat16: bool = False

    @classmethod
    def of(cls, device: str, workers: int | None = None, *, bfloat16: bool = False) -> Machine:
        """A machine by the name of its device. Unless told, a GPU is fed by every core, a CPU needs its cores itself.

        A GPU computes in bfloat16 in any case.
        """
        if workers is None:
            workers = (os.cpu_count() or 1) if device == "cuda" else 1
        return cls(torch.device(device), workers, bfloat16 or device == "cuda")

    def batches(
        self, views: Dataset[tuple[Tensor, Any]], plan: OptimiserPlan
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """The views in batches of the plan's size, the remainder dropped."""
        return DataLoader(
            views,
            plan.batch_size,
            drop_last=True,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )

    def ahead(
        self, make: Callable[[Item], tuple[Tensor, ...]], items: Iterable[Item]
    ) -> Iterator[tuple[Tensor, ...]]:
        """What `make` makes of each item, the next while one is used: in a thread and a stream of its own."""
        stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

        def made(item: Item) -> tuple[Tensor, ...]:
            with torch.cuda.stream(stream):
                tensors = make(item)
            if stream:
                stream.synchronize()
            return tensors

        waiting = iter(items)
        with ThreadPoolExecutor(1) as pool:
            coming = deque(pool.submit(made, item) for item in islice(waiting, 1))
            while coming:
                tensors = coming.popleft().result()
                coming.extend(pool.submit(made, item) for item in islice(waiting, 1))
                if stream:
                    for tensor in tensors:
                        # Else its memory is given away while this stream still reads it.
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield tensors

    def as_input(self, views: Tensor) -> Tensor:
        """uint8 N×H×W×3 to float N×3×H×W in channels-last memory, on the device."""
        moved = views.to(self.device, non_blocking=True)
        return moved.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)

    def prepare(self, network: nn.Module) -> None:
        """Move the network here, in the layout and with the operators that are fastest here."""
        if self.bfloat16 and self.device.type == "cpu":
            speed_up_depthwise(network)
        network.to(self.device, memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        """bfloat16 where that is safe, if this machine computes in it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


CPU = Machine.of("cpu")

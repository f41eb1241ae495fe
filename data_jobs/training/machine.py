"""Where a run computes: the device, its memory layout and precision, and the processes that feed it."""

from __future__ import annotations

from dataclasses import dataclass
import os

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data_jobs.training.draws import AugmentedDraws
from data_jobs.training.plans import OptimiserPlan
from data_jobs.training.precision import speed_up_depthwise


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

    def batches(self, views: AugmentedDraws, plan: OptimiserPlan) -> DataLoader[tuple[Tensor, Tensor]]:
        """The views in batches of the plan's size, the remainder dropped."""
        return DataLoader(
            views,
            plan.batch_size,
            drop_last=True,
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )

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

"""What the teachers of a student say of its batches.

Distillation (Hinton et al., 2015) goes view by view: the teachers see the very pixels that the student does, augmented
and mixed, at their own size. So a function is matched, not a list of answers (Beyer et al., Knowledge distillation: A
good teacher is patient and consistent, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch.nn import functional

from data_jobs.training.loss import Mixture
from data_jobs.training.recipe import DistillationPlan, TeacherPlan
from data_jobs.training.scan import open_onnx


class Teachers:
    """The models of a `[distillation]` table, computed by ONNX Runtime on the CPU."""

    def __init__(self, plan: DistillationPlan, models: Path | None, prior: NDArray[np.float64]) -> None:
        """`models`: a folder of model folders; `prior`: class shares of the images trained on.

        Raises ValueError when a teacher is not there, or is another file than the recipe names.
        """
        if models is None:
            names = " and ".join(teacher.model_id for teacher in plan.teachers)
            raise ValueError(
                f"This recipe is taught by {names}: give the folder of their model folders with --teachers."
            )
        self.side = plan.side
        threads = torch.get_num_threads()
        self._teachers = [
            (teacher, open_onnx(_content(teacher, models), threads)) for teacher in plan.teachers
        ]
        self._log_prior = torch.from_numpy(np.log(prior)).float()

    def logits(self, images: Tensor) -> Tensor:
        """Mean logits N×8 of float N×3×side×side, 0 to 255, before any of the prior was restored to them."""
        pixels = images.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        total = torch.zeros(len(pixels), len(self._log_prior))
        for teacher, run in self._teachers:
            total += teacher.share * (
                torch.from_numpy(run(pixels)[0]) - teacher.prior_shift * self._log_prior
            )
        return total.to(images.device)

    def teach(self, mixtures: Iterator[Mixture], side: int) -> Iterator[Mixture]:
        """The mixtures with the teachers' logits, their images brought to the student's side."""
        for mixture in mixtures:
            taught = self.logits(mixture.images)
            yield replace(mixture, images=_resized(mixture.images, side), taught=taught)


def _resized(images: Tensor, side: int) -> Tensor:
    if images.shape[-1] == side:
        return images
    smaller = functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
    return smaller.contiguous(memory_format=torch.channels_last)


def _content(teacher: TeacherPlan, models: Path) -> bytes:
    path = models / teacher.model_id / "model.onnx"
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"There is no {path}: the recipe is taught by {teacher.model_id}.") from error
    if hashlib.sha256(content).hexdigest() != teacher.model_sha256:
        raise ValueError(f"{path} is not the model that the recipe names: its SHA-256 is another.")
    return content

"""What the interface asks of the graph: five stages, wherever they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deployments.classifier.classifier import ClassifierOutput
from deployments.preprocess.preprocess import PreparedImage
from deployments.risk.findings import Findings
from serve_app.domain.assessment import Conclusion, Neighbours
from serve_app.domain.errors import RejectedUpload
from serve_app.domain.reference_filter import ReferenceFilter
from serve_app.records.serving import LiveModel


class Stages(Protocol):
    """The way of one lesion, a method a stage.

    On Ray Serve each is a deployment; in the benchmark's baseline and in unit tests each is
    the same plain function in this process. Every method raises Overloaded when its stage
    refused the work, and StageFailed when it did not answer.
    """

    async def warm(self, models: Sequence[LiveModel]) -> Sequence[Mapping[str, str]]:
        """Have every replica of every stage load these models, and keep them until others are named.

        Returns what each replica has in memory, digests by model id; a stage that holds no models gives none.
        Raises StageFailed when one cannot, or takes too long.
        """

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Uploaded bytes to pixels at the model's input size."""

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Pixels, uint8 H×W×3, to probabilities and bottleneck."""

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Bottleneck (512) to a unit vector (512) of one embedding space."""

    async def nearest(
        self,
        embedding: NDArray[np.float32],
        embedding_space: str,
        k: int,
        reference_filter: ReferenceFilter,
    ) -> Neighbours:
        """A unit vector to the nearest references of its space, among those that pass the filter."""

    async def conclude(self, model_id: str, findings: Findings) -> Conclusion:
        """Everything found to outcome, risk and urgency."""

"""The same graph in this process, without Ray: the benchmark's baseline, and the tests' quick way."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deployments.classifier.classifier import Classifier, ClassifierOutput
from deployments.embedder.embedder import Embedder
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.preprocess import PreparedImage, prepare_or_reject
from deployments.risk.findings import Findings
from deployments.risk.stage import RiskStage
from model_store.registry import ModelStore
from serve_app.domain.assessment import Conclusion, Neighbours
from serve_app.domain.errors import RejectedUpload
from serve_app.records.references import ReferenceStore


class LocalStages:
    """The five stages as plain calls; those that compute run in threads, as on Ray Serve."""

    def __init__(
        self,
        *,
        models: Path,
        references: ReferenceStore,
        limits: UploadLimits,
        threads: int,
        policy_version: str,
    ) -> None:
        self._store = ModelStore(models)
        self._limits = limits
        self._classifier = Classifier(self._store, threads=threads)
        self._embedder = Embedder(self._store)
        self._references = references
        self._risk = RiskStage(self._store, policy_version)

    def load(self, model_id: str, embedding_space: str) -> None:
        """Make a model ready before its first request."""
        self._classifier.load(model_id)
        self._embedder.load(model_id, embedding_space)

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Prepare one upload."""
        spec = self._store.open(model_id).manifest.input
        return await asyncio.to_thread(prepare_or_reject, data, spec, self._limits)

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Classify prepared pixels."""
        return (await asyncio.to_thread(self._classifier.classify, model_id, [pixels]))[0]

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed a bottleneck."""
        return self._embedder.embed(model_id, embedding_space, bottleneck)

    async def nearest(
        self, embedding: NDArray[np.float32], embedding_space: str, k: int, licences: tuple[str, ...]
    ) -> Neighbours:
        """Search the references."""
        return await self._references.nearest(
            embedding, embedding_space=embedding_space, k=k, licences=licences
        )

    async def conclude(self, model_id: str, findings: Findings) -> Conclusion:
        """Conclude from everything found."""
        return self._risk.conclude(model_id, findings)

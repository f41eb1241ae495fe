"""The baseline: the same functions, routes, database, durability and audit, in plain uvicorn workers.

`uvicorn benchmarks.baseline:make_app --factory --workers 2`: no Ray, one process a core. The stages are the tests'
quick way, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
import os
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI
import numpy as np
from numpy.typing import NDArray

from deployments.classifier.classifier import Classifier, ClassifierOutput
from deployments.embedder.embedder import Embedder
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.preprocess import PreparedImage, prepare_or_reject
from deployments.risk.policy import CURRENT_VERSION
from deployments.risk.risk import RiskStage
from deployments.risk.rules import Findings
from model_store.registry import ModelStore
from serve_app.domain.assessment import Conclusion, Neighbours, ReferenceFilter
from serve_app.domain.errors import RejectedUpload, StageFailed
from serve_app.http.app import create_app
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings

Result = TypeVar("Result")


class LocalStages:
    """The five stages as plain calls; those that compute run in threads, as on Ray Serve."""

    def __init__(
        self,
        *,
        models: Path,
        limits: UploadLimits,
        threads: int,
        policy_version: str,
        references: ReferenceStore | None = None,
    ) -> None:
        self._store = ModelStore(models)
        self._limits = limits
        self._classifier = Classifier(self._store, threads=1)
        self._embedder = Embedder(self._store)
        self._references = references
        self._risk = RiskStage(self._store, policy_version)
        # As many computing threads as cores are meant for this process: more would only
        # take turns, and every request would be as slow as the slowest.
        self._compute = ThreadPoolExecutor(threads, thread_name_prefix="stage")

    def search(self, references: ReferenceStore) -> None:
        """Search these references: they come with a database pool, which may open later than this."""
        self._references = references

    async def warm(self, models: Sequence[LiveModel]) -> list[Mapping[str, str]]:
        """Make models ready before their first request."""
        return [
            await asyncio.to_thread(warm, models) for warm in (self._classifier.warm, self._embedder.warm)
        ]

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Prepare one upload."""
        model = await self._store.opened(model_id)
        return await self._run(prepare_or_reject, data, model.manifest.input, self._limits)

    async def classify(self, model_id: str, pixels: NDArray[np.uint8]) -> ClassifierOutput:
        """Classify prepared pixels."""
        return (await self._run(self._classifier.classify, model_id, [pixels]))[0]

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed a bottleneck."""
        return self._embedder.embed(model_id, embedding_space, bottleneck)

    async def nearest(
        self, embedding: NDArray[np.float32], embedding_space: str, k: int, reference_filter: ReferenceFilter
    ) -> Neighbours:
        """Search the references."""
        if self._references is None:
            raise StageFailed("The references are not open.")
        return await self._references.nearest(
            embedding, embedding_space=embedding_space, k=k, reference_filter=reference_filter
        )

    async def conclude(self, model: LiveModel, findings: Findings) -> Conclusion:
        """Conclude from everything found."""
        return await self._risk.conclude(model, findings)

    async def _run(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._compute, function, *arguments)


def make_app() -> FastAPI:
    """Make one worker's application; BASELINE_THREADS is the ONNX Runtime threads of a worker."""
    settings = load_settings()
    stages = LocalStages(
        models=settings.models,
        limits=UploadLimits(settings.max_upload_bytes, settings.max_upload_pixels, settings.min_side),
        threads=int(os.environ["BASELINE_THREADS"]),
        policy_version=CURRENT_VERSION,
    )
    app = create_app(settings, stages)
    open_services = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(app):
            services = app.state.services
            stages.search(ReferenceStore(services.pool))
            live = await services.live.current()
            await stages.warm([live])
            yield

    app.router.lifespan_context = lifespan
    return app

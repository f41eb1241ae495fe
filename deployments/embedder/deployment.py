"""The embedder stage on Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from ray import serve
from ray.serve.metrics import Gauge

from deployments.canary import Canaries, Off
from deployments.embedder.embedder import Embedder
from deployments.live_model import warm_at_start
from model_store.registry import ModelStore
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings


@serve.deployment(name="embedder")
class EmbedderDeployment:
    """A 512×512 product takes microseconds, so it runs on the loop."""

    async def __init__(self) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._embedder = Embedder(ModelStore(settings.models))
        self._canaries = Canaries(self._prove, Gauge)
        await warm_at_start(settings, self._embedder.warm)

    async def check_health(self) -> None:
        """Raises StageFailed when the canary has failed, for Serve to replace this replica."""
        self._canaries.check()

    async def _prove(self) -> Off:
        return self._embedder.prove()

    async def warm(self, models: Sequence[LiveModel]) -> dict[str, str]:
        """Have these models ready, and no others for longer than they are used; their digests by id."""
        return await asyncio.to_thread(self._embedder.warm, models)

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed one bottleneck (512) in one of the model's spaces. Raises StageFailed when the canary has failed."""
        self._canaries.require_sound()
        if (model_id, embedding_space) not in self._embedder:  # a replay of an old model
            await asyncio.to_thread(self._embedder.load, model_id, embedding_space)
        return self._embedder.embed(model_id, embedding_space, bottleneck)

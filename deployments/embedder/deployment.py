"""The embedder stage on Ray Serve."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from ray import serve

from deployments.embedder.embedder import Embedder
from deployments.live_model import live_model_at_start
from model_store.registry import ModelStore
from serve_app.logs.process import ProcessLog
from serve_app.settings import load_settings


@serve.deployment(name="embedder")
class EmbedderDeployment:
    """A 512×512 product takes microseconds, so it runs on the loop."""

    async def __init__(self) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._embedder = Embedder(ModelStore(settings.models))
        live = await live_model_at_start(settings)
        self._embedder.load(live.model_id, live.embedding_space)

    async def embed(
        self, model_id: str, embedding_space: str, bottleneck: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Embed one bottleneck (512) in one of the model's spaces."""
        return self._embedder.embed(model_id, embedding_space, bottleneck)

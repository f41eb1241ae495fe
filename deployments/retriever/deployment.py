"""The retriever stage on Ray Serve."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from ray import serve

from model_store.manifest import EMBEDDING_DIM
from serve_app.domain.assessment import Neighbours, ReferenceFilter
from serve_app.logs import ProcessLog
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings


@serve.deployment(name="retriever")
class RetrieverDeployment:
    """One connection pool a replica."""

    async def __init__(self) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        pool = await open_pool(
            settings.database_url.get_secret_value(),
            minimum=settings.database_pool_min,
            maximum=settings.database_pool_max,
            timeout_s=settings.database_timeout_s,
        )
        self._references = ReferenceStore(pool)

    async def warm(self, models: Sequence[LiveModel]) -> dict[str, str]:
        """Search once in the models' spaces, so that no caller waits for pages from disk; holds no models itself."""
        anything = np.eye(1, EMBEDDING_DIM, dtype=np.float32)[0]
        for model in models:
            await self._references.nearest(anything, embedding_space=model.embedding_space, k=1)
        return {}

    async def nearest(
        self, embedding: NDArray[np.float32], embedding_space: str, k: int, reference_filter: ReferenceFilter
    ) -> Neighbours:
        """The K nearest references in one space that pass the filter, at most one image a lesion."""
        return await self._references.nearest(
            embedding, embedding_space=embedding_space, k=k, reference_filter=reference_filter
        )

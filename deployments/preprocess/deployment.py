"""The preprocess stage on Ray Serve."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
import os

from ray import serve

from deployments.live_model import live_model_at_start
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.preprocess import PreparedImage, prepare_or_reject
from model_store.registry import ModelStore
from serve_app.domain.errors import RejectedUpload
from serve_app.logs.process import ProcessLog
from serve_app.settings import load_settings


@serve.deployment(name="preprocess")
class PreprocessDeployment:
    """Decodes in a thread for every core: never more large images open than can be worked on."""

    async def __init__(self) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._limits = UploadLimits(settings.max_upload_bytes, settings.max_upload_pixels, settings.min_side)
        self._decoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="decoder")
        self._store = ModelStore(settings.models)
        live = await live_model_at_start(settings)
        self._store.open(live.model_id)

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Prepare one upload for a model."""
        spec = self._store.open(model_id).manifest.input
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, prepare_or_reject, data, spec, self._limits)

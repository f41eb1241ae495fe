"""The preprocess stage on Ray Serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray import serve

from deployments.cores import SharedCores
from deployments.live_model import warm_at_start
from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.decoder import Decoder
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import PreparedImage
from model_store.registry import ModelStore
from serve_app.domain.errors import RejectedUpload
from serve_app.logs import ProcessLog
from serve_app.records.serving import LiveModel
from serve_app.settings import load_settings


@serve.deployment(name="preprocess")
class PreprocessDeployment:
    """Has images decoded, as many at once as its share of the cores: never more open than are worked on."""

    async def __init__(self) -> None:  # type: ignore[misc]
        settings = load_settings()
        ProcessLog.of_node(settings.token_secret).install()
        self._limits = UploadLimits(settings.max_upload_bytes, settings.max_upload_pixels, settings.min_side)
        self._cores = SharedCores("preprocess")
        self._decoder = Decoder()
        self._store = ModelStore(settings.models)
        await warm_at_start(settings, self._store.warm)

    async def check_health(self) -> None:
        """Serve asks every few seconds: the moment to see who else wants this machine's cores."""
        self._cores.share()

    async def warm(self, models: Sequence[LiveModel]) -> dict[str, str]:
        """Have these models ready, and no others for longer than they are used; their digests by id."""
        return await asyncio.to_thread(self._store.warm, models)

    async def prepare(self, model_id: str, data: bytes) -> PreparedImage | RejectedUpload:
        """Prepare one upload for a model."""
        geometry = InputGeometry.from_manifest((await self._store.opened(model_id)).manifest.input)
        return await self._cores.run(self._decoder.prepare_or_reject, data, geometry, self._limits)

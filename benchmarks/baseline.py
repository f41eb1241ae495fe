"""The baseline: the same functions, routes, database, durability and audit, in plain uvicorn workers.

`uvicorn benchmarks.baseline:make_app --factory --workers 2`: no Ray, one process a core.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
import os

from fastapi import FastAPI

from deployments.preprocess.decode import UploadLimits
from graphs.triage import TriageArgs
from serve_app.http.app import create_app
from serve_app.records.references import ReferenceStore
from serve_app.settings import load_settings
from tests.local_stages import LocalStages


def make_app() -> FastAPI:
    """Make one worker's application; BASELINE_THREADS is the ONNX Runtime threads of a worker."""
    settings = load_settings()
    stages = LocalStages(
        models=settings.models,
        limits=UploadLimits(settings.max_upload_bytes, settings.max_upload_pixels, settings.min_side),
        threads=int(os.environ["BASELINE_THREADS"]),
        policy_version=TriageArgs().policy_version,
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

"""The FastAPI application, without Ray: the ingress and the benchmark's baseline serve the same one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import contextlib
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from deployments.preprocess.decode import UploadLimits
from serve_app.access.rules import EmergencyLimits
from serve_app.audit.checkpoints import CheckpointLog
from serve_app.erasure.eraser import Eraser
from serve_app.erasure.sweeping import Housekeeper
from serve_app.http import emergency_access, erasure, health, lesions, replay, similar
from serve_app.http.access import Authenticator
from serve_app.http.admission import AdmissionGate, BodyPace
from serve_app.http.documents import name_documents
from serve_app.http.problems import install_problem_handlers
from serve_app.http.request_id import RequestIdMiddleware
from serve_app.http.services import Services
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.lesions.assess import Assessor, Stages
from serve_app.lesions.live_model import LiveModelWatch
from serve_app.lesions.recovery import recover_forever
from serve_app.lesions.replay import Replayer
from serve_app.lesions.similar import Searcher
from serve_app.lesions.triage import Triage
from serve_app.pms.delivery import open_pms
from serve_app.records.access import AccessStore
from serve_app.records.audit_log import AuditChain
from serve_app.records.erasures import ErasureStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.retention import Housekeeping, RetentionStore, claim_key_store, refuse_lost_keys
from serve_app.settings import Settings
from serve_app.version import package_version, service_version
from serve_app.worker import InvariantWatch, Sealer


class _App(FastAPI):
    """Answers HEAD as GET without the body: the same checks, headers and audit events."""

    def openapi(self) -> dict[str, Any]:
        """Describe the interface."""
        if self.openapi_schema is None:
            self.openapi_schema = name_documents(super().openapi())
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await super().__call__(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # A copy: the server looks at its own to know whether a body may follow.
        await super().__call__({**scope, "method": "GET"}, receive, send_without_body)


async def open_services(settings: Settings, stages: Stages) -> Services:
    """Open pool and key store, and put the parts together.

    IntegrityError when the key store is another keyring's or another database's, or lost; KeyProviderUnavailable when the keyring is.
    """
    pool = await open_pool(
        settings.database_url.get_secret_value(),
        minimum=settings.database_pool_min,
        maximum=settings.database_pool_max,
        timeout_s=settings.database_timeout_s,
    )
    records = LesionStore(pool)
    try:
        keys = await _open_keys(settings, pool)
    except BaseException:
        await pool.close()
        raise
    assessor = Assessor(stages, service_version=await asyncio.to_thread(service_version))
    pms = open_pms(settings, pool, records)
    return Services(
        pool=pool,
        records=records,
        keys=keys,
        live=LiveModelWatch(pool, settings.models, stages.warm),
        invariants=InvariantWatch(pool),
        sealer=Sealer(
            AuditChain(pool),
            CheckpointLog(settings.files.audit_checkpoints, settings.files.audit_signing_key),
        ),
        triage=Triage(
            assessor=assessor,
            records=records,
            keys=keys,
            consultation=pms.consultation,
            tells_pms=pms.delivery is not None,
        ),
        replayer=Replayer(assessor=assessor, records=records, keys=keys, models=settings.models),
        searcher=Searcher(stages=stages, records=records, references=ReferenceStore(pool)),
        eraser=Eraser(ErasureStore(pool), keys, tells_pms=pms.delivery is not None),
        pms=pms,
        admission=AdmissionGate(
            max_requests=settings.max_uploads_in_flight,
            max_bytes=settings.max_upload_bytes_in_flight,
            pace=BodyPace(settings.body_timeout_s, settings.body_min_bytes_per_s),
        ),
        limits=UploadLimits(settings.max_upload_bytes, settings.max_upload_pixels, settings.min_side),
        authenticator=Authenticator(settings, AccessStore(pool), records),
        access=AccessStore(pool),
        emergency_limits=EmergencyLimits(
            minutes=settings.emergency_access_minutes, max_minutes=settings.emergency_access_max_minutes
        ),
    )


async def _open_keys(settings: Settings, pool: Pool) -> KeyStore:
    keystore = settings.files.keystore
    await refuse_lost_keys(pool, keystore)
    keys = KeyStore(keystore, open_key_provider(settings, first_start=not keystore.exists()))
    try:
        await claim_key_store(pool, keys, keystore)
    except BaseException:
        keys.close()
        raise
    return keys


def _housekeeper(settings: Settings, services: Services) -> Housekeeper:
    return Housekeeper(
        eraser=services.eraser,
        housekeeping=Housekeeping(services.pool),
        retention=RetentionStore(services.pool),
        keys=services.keys,
        idempotency_days=settings.idempotency_days,
        retention_days=settings.retention_days,
    )


def create_app(settings: Settings, stages: Stages, *, answer_request_id: bool = True) -> FastAPI:
    """Make the application; its services open and close with its lifespan.

    `answer_request_id`: put X-Request-ID on responses; not where the server in front does it.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = await open_services(settings, stages)
        app.state.services = services
        tasks = (
            asyncio.create_task(recover_forever(services.records, services.triage, services.live)),
            asyncio.create_task(services.invariants.check_forever()),
            asyncio.create_task(services.authenticator.summarise_forever()),
            asyncio.create_task(_housekeeper(settings, services).keep_forever()),
            asyncio.create_task(services.sealer.seal_forever()),
            asyncio.create_task(services.live.watch_forever()),
            asyncio.create_task(services.live.report_forever()),
            *services.pms.start(),
        )
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await services.pms.close()
            await services.pool.close()
            services.keys.close()

    app = _App(
        title="pms-derm-cds",
        version=package_version(),
        summary="Dermatology decision support for clinicians; never a diagnosis.",
        lifespan=lifespan,
        # Nothing but the health routes is anonymous, so the document has a route of its own.
        openapi_url=None,
        # A redirect would have the caller send a patient's image twice.
        redirect_slashes=False,
    )
    install_problem_handlers(app)
    app.add_middleware(RequestIdMiddleware, answer=answer_request_id)
    app.include_router(health.router)
    app.include_router(lesions.router)
    app.include_router(lesions.timeline_router)
    app.include_router(erasure.router)
    app.include_router(replay.router)
    app.include_router(similar.router)
    app.include_router(similar.references_router)
    app.include_router(emergency_access.router)
    return app

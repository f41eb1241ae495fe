"""The services that faults are put into: one in this process, and the whole node with Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
import os
from pathlib import Path
import re
import tempfile
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
import httpx
import psutil
from pydantic import SecretStr

from benchmarks.faults_load import Target
from benchmarks.systems import System, running_graph
from cluster.node_files import read_service_environment, write_service_environment
from cluster.ports import choose_port
from cluster.postgres import DatabaseUrls, EmbeddedPostgres, supervise
from data_jobs.references.load import publish_bundled
from deployments.preprocess.decode import UploadLimits
from deployments.risk.policy import CURRENT_VERSION
from model_store.registry import ModelStore
from serve_app.access.tokens import mint_token
from serve_app.audit.events import account_event
from serve_app.http.app import create_app
from serve_app.lesions.recovery import recover_once
from serve_app.records.access import AccessStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.settings import REPOSITORY, Settings
from tests.local_stages import LocalStages

_CLINICIAN = "dr-faults"
#: The load's own rate is not what is tested here.
_NO_RATE_LIMIT = 1_000_000


@dataclass(frozen=True)
class LocalService:
    """The application in this process over the plain stages, on a real PostgreSQL and key store."""

    app: FastAPI
    target: Target
    settings: Settings


@asynccontextmanager
async def local_service(home: Path, urls: DatabaseUrls, **others: Any) -> AsyncIterator[LocalService]:  # noqa: ANN401 - settings of any kind
    """Run the application on a migrated database that has references and a live model; `others`: more settings."""
    secret = uuid4().hex * 2
    settings = Settings(
        home=home,
        database_url=SecretStr(urls.app),
        token_secret=SecretStr(secret),
        models=_models(),
        database_pool_max=6,
        rate_limit_per_s=_NO_RATE_LIMIT,
        rate_limit_burst=_NO_RATE_LIMIT,
        **others,
    )
    stages = LocalStages(
        models=settings.models,
        limits=UploadLimits(min_side=settings.min_side),
        threads=1,
        policy_version=CURRENT_VERSION,
    )
    owner = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    app = create_app(settings, stages)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://derm", timeout=60) as client,
        ):
            services = app.state.services
            stages.search(ReferenceStore(services.pool))

            async def recover() -> None:
                # At once, whoever worked on it: a benchmark does not wait for leases to end.
                await owner.execute("UPDATE assessments SET lease_until = NULL WHERE outcome = 'pending'")
                await recover_once(services.records, services.triage, services.live)

            patient = await _assign(owner)
            target = Target(client, partial(_headers, secret), patient, owner, recover)
            yield LocalService(app, target, settings)
    finally:
        await owner.close()


async def prepare_database(urls: DatabaseUrls) -> None:
    """Migrate, load the shipped model's references and make it live."""
    models = _models()
    await migrate(urls.owner, application_role="derm_app")
    await publish_bundled(urls.owner, models, next(iter(ModelStore(models))))


@dataclass(frozen=True)
class GraphService:
    """A node as `derm-cds serve` starts it: embedded PostgreSQL with its supervisor, Ray, HAProxy."""

    system: System
    target: Target

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replicas of one deployment, found by the title that Ray gives them."""
        assert self.system.node is not None  # noqa: S101 - narrows for the type checker
        pattern = re.compile(rf"ray::.*\btriage[:#]{deployment}\b")
        return [process for process in self.system.node.processes() if pattern.match(_title(process))]


@asynccontextmanager
async def graph_service(home: Path) -> AsyncIterator[GraphService]:
    """Start a whole node below `home`, and stop it."""
    postgres = EmbeddedPostgres(home)
    urls = await asyncio.to_thread(postgres.ensure)
    write_service_environment(home, urls)
    await prepare_database(urls)
    secret = read_service_environment(home)["DERM_TOKEN_SECRET"]
    owner = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    port = choose_port()
    limit = str(_NO_RATE_LIMIT)
    settings = {"DERM_RATE_LIMIT_PER_S": limit, "DERM_RATE_LIMIT_BURST": limit}
    starting = running_graph(home, port=port, settings=settings)
    try:
        with supervised(postgres):
            system = await asyncio.to_thread(starting.__enter__)
            try:
                base = f"http://127.0.0.1:{port}"
                async with httpx.AsyncClient(base_url=base, timeout=60) as client:
                    target = Target(client, partial(_headers, secret), await _assign(owner), owner)
                    yield GraphService(system, target)
            finally:
                await asyncio.to_thread(starting.__exit__, None, None, None)
    finally:
        await owner.close()
        await asyncio.to_thread(postgres.stop)


@contextmanager
def supervised(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Have PostgreSQL started again when it dies, as `derm-cds serve` does."""
    stop = Event()
    thread = Thread(target=supervise, args=(postgres, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def new_home(prefix: str, folder: Path | None = None) -> Path:
    """Make a home that PostgreSQL's own account may pass through."""
    home = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    home.chmod(0o711)
    return home


def _models() -> Path:
    return Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))


def _headers(secret: str) -> dict[str, str]:
    token = mint_token(
        secret=secret, issuer="derm-cds", audience="derm-cds", subject=_CLINICIAN, roles=["clinician"]
    )
    return {"Authorization": f"Bearer {token}"}


async def _assign(owner: Pool) -> str:
    patient = f"p-{uuid4().hex[:12]}"
    since = datetime(2026, 1, 1, tzinfo=UTC)
    event = account_event("assign", patient_id=patient)
    await AccessStore(owner).assign(patient, _CLINICIAN, starts_at=since, ends_at=None, event=event)
    return patient


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

"""One real node for the session: embedded PostgreSQL, Ray, the graph, HTTP on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
import io
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
from threading import Event, Thread
import time
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from cluster.node_files import read_service_environment, write_service_environment
from cluster.ports import choose_ports
from cluster.postgres import DatabaseUrls, EmbeddedPostgres, supervise
from cluster.ray_node import RayNode
from data_jobs.references.load import publish_bundled
from data_jobs.sample_lesion import draw_lesion
from serve_app.access.tokens import mint_token
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool
from serve_app.settings import REPOSITORY
from tests.end_to_end.originals import draw_original
from tests.end_to_end.twin_model import make_twin

DEPLOYMENTS = ("ingress", "preprocess", "classifier", "embedder", "retriever", "risk")
_WHOLE_S = 60.0


@dataclass
class Node:
    """The service as an operator starts it: same environment, same processes."""

    home: Path
    models: Path
    model_id: str
    port: int = field(init=False)
    urls: DatabaseUrls = field(init=False)
    postgres: EmbeddedPostgres = field(init=False)
    ray: RayNode = field(init=False)

    def __post_init__(self) -> None:
        names = ("port", "stats_port", "metrics_port", "dashboard_port", "fallback_port")
        self.postgres = EmbeddedPostgres(self.home)
        self.port, *ports = choose_ports(1 + len(names))
        self.ray = RayNode(self.home, **dict(zip(names, ports, strict=True)))

    async def start(self) -> None:
        """Start everything that is not running."""
        self.urls = self.postgres.ensure()
        await migrate(self.urls.owner, application_role="derm_app")
        await publish_bundled(self.urls.owner, self.models, self.model_id)
        write_service_environment(self.home, self.urls)
        # Replicas find the models where their node was told to look.
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("DERM_MODELS", str(self.models))
            # Logical ones: room for a second replica of each deployment during an update, on any machine.
            patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
            self.ray.start()
        command = [sys.executable, "-m", "cluster.deploy", "--address", self.ray.address]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--profile", "cpu"]
        self.run(*command[1:])
        await self.until_ready()

    def run(self, *arguments: str) -> str:
        """Run Python with the node's environment."""
        environment = {**self.ray.environment, "DERM_MODELS": str(self.models), "PYTHONWARNINGS": ""}
        log = self.home / f"run-{uuid4().hex[:6]}.log"
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, *arguments],
                env=environment,
                cwd=REPOSITORY,
                stdout=output,
                stderr=output,
                timeout=180,
                check=False,
            )
        said = log.read_text()
        assert done.returncode == 0, said[-4000:]
        return said

    async def until_ready(self) -> None:
        """Wait for the service to say that it is."""
        deadline = time.monotonic() + _WHOLE_S
        async with httpx.AsyncClient() as client:
            while True:
                try:
                    response = await client.get(f"http://127.0.0.1:{self.port}/readyz", timeout=5)
                    if response.status_code == 200:
                        return
                except httpx.HTTPError:
                    pass
                assert time.monotonic() < deadline, "the service did not become ready"
                await asyncio.sleep(0.25)

    def stop(self) -> None:
        """Stop everything; leave the home as it is."""
        self.ray.stop()
        self.postgres.stop()

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replicas of one deployment, found by the title that Ray gives them."""
        return [
            process
            for process in self.ray.processes()
            if re.match(rf"ray::.*\btriage[:#]{deployment}\b", _title(process))
        ]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@dataclass(frozen=True)
class Pms:
    """A PMS and its clinician, over the network."""

    node: Node
    client: httpx.AsyncClient
    owner: Pool

    def token(self, subject: str = "dr") -> dict[str, str]:
        """Headers of a caller."""
        secret = read_service_environment(self.node.home)["DERM_TOKEN_SECRET"]
        token = mint_token(
            secret=secret, issuer="derm-cds", audience="derm-cds", subject=subject, roles=["clinician"]
        )
        return {"Authorization": f"Bearer {token}"}

    async def care(self, subject: str = "dr") -> str:
        """A new patient in the caller's care."""
        patient_id = f"p-{uuid4().hex[:12]}"
        since = datetime(2026, 1, 1, tzinfo=UTC)
        care = "INSERT INTO care_assignments VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
        await self.owner.execute(care, patient_id, subject, since)
        return patient_id

    async def upload(
        self, patient_id: str, image: bytes, *, headers: dict[str, str] | None = None, **fields: str
    ) -> httpx.Response:
        """Send one image."""
        return await self.client.post(
            "/api/lesions",
            data={"patient_id": patient_id, **fields},
            files={"image": ("lesion.jpg", image)},
            headers={**self.token(), **(headers or {})},
        )

    async def original(self, answer: dict[str, Any]) -> bytes:
        """Download an answer's image."""
        response = await self.client.get(
            f"/api/lesions/{answer['lesion_id']}/images/{answer['image_id']}", headers=self.token()
        )
        assert response.status_code == 200, response.text
        return response.content

    async def pending(self) -> int:
        """Count assessments that wait."""
        count: int = await self.owner.fetchval("SELECT count(*) FROM assessments WHERE outcome = 'pending'")
        return count

    async def until_none_pending(self) -> float:
        """Wait, without a hand, for every assessment to be finished; returns the seconds it took."""
        since = time.monotonic()
        while await self.pending():
            assert time.monotonic() - since < _WHOLE_S, "assessments stayed pending"
            await asyncio.sleep(0.5)
        return time.monotonic() - since


@pytest.fixture(scope="session")
def two_models(models: Path, model_id: str, tmp_path_factory) -> Path:
    """A store with the shipped model and its twin."""
    store = tmp_path_factory.mktemp("models")
    (store / model_id).symlink_to(models / model_id)
    make_twin(models / model_id, store)
    return store


@pytest.fixture(scope="session")
def twin_id(model_id: str) -> str:
    """The twin's id: see twin_model.py."""
    return f"{model_id}twin"


@pytest.fixture(scope="session")
async def node(two_models: Path, model_id: str) -> AsyncIterator[Node]:
    """The one running node."""
    node = Node(_new_home(), two_models, model_id)
    try:
        await node.start()
        yield node
    finally:
        node.stop()
        shutil.rmtree(node.ray.directory, ignore_errors=True)
        shutil.rmtree(node.home, ignore_errors=True)


def _new_home() -> Path:
    # Short, and not pytest's tmp_path: PostgreSQL's account must be let through.
    home = Path(tempfile.mkdtemp(prefix="derm-e2e-"))
    home.chmod(0o711)
    return home


@pytest.fixture(scope="session")
def supervised(node: Node) -> Iterator[None]:
    """PostgreSQL is started again when it dies, as `derm-cds serve` does."""
    stop = Event()
    thread = Thread(target=supervise, args=(node.postgres, stop))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.fixture(scope="session")
async def pms(node: Node) -> AsyncIterator[Pms]:
    """A caller."""
    owner = await open_pool(node.urls.owner, minimum=0, maximum=2, timeout_s=20)
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=100)
    base = f"http://127.0.0.1:{node.port}"
    async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as client:
        yield Pms(node, client, owner)
    await owner.close()


@pytest.fixture(scope="session")
def lesion_image() -> Callable[..., bytes]:
    """Draw a lesion as a camera would send it: `(seed, size) -> JPEG`."""

    def draw(seed: int = 1, size: tuple[int, int] = (400, 300)) -> bytes:
        buffer = io.BytesIO()
        draw_lesion(size=size, seed=seed).save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    return draw


@pytest.fixture(scope="session")
def large_original() -> Callable[[int], bytes]:
    """Draw a square original that does not compress: `(side) -> PNG` of three bytes a pixel."""

    return lambda side: draw_original(side, seed=side)

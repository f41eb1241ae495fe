"""One real node for the session: embedded PostgreSQL, Ray, the graph, HTTP on a port of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
import shutil
import subprocess
import sys
import time
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
from PIL import Image
import psutil
import pytest

from benchmarks.faults_load import GraphService, graph_service, new_home
from cluster.node_files import read_service_environment
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.prepare import DEFAULT_NAME
from cluster.ray_node import RayNode
from data_jobs.training.manifest_file import seal
from graphs.profiles import NUM_CPUS
from model_store.manifest import read_manifest
from serve_app.access.tokens import mint_token
from serve_app.records.pool import Pool
from serve_app.settings import REPOSITORY
from tests.images import encode, lesion_jpeg
from tests.model_folders import copy_model, turn_references

DEPLOYMENTS = tuple(NUM_CPUS)
_WHOLE_S = 60.0


@dataclass(frozen=True)
class Node:
    """The service as an operator starts it: same environment, same processes."""

    home: Path
    models: Path
    urls: DatabaseUrls
    service: GraphService

    @property
    def ray(self) -> RayNode:
        assert self.service.system.node is not None
        return self.service.system.node

    @property
    def postgres(self) -> EmbeddedPostgres:
        return self.service.system.postgres

    @property
    def port(self) -> int:
        port = self.service.target.client.base_url.port
        assert port is not None
        return port

    def run(self, *arguments: str) -> str:
        """Run Python with the node's environment; what it said."""
        environment = {**self.ray.environment, "DERM_MODELS": str(self.models), "PYTHONWARNINGS": ""}
        log = self.home / f"run-{uuid4().hex[:6]}.log"
        with log.open("w") as output:
            command = [sys.executable, *arguments]
            done = subprocess.run(
                command,
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

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """The replicas of one deployment."""
        return self.service.replicas(deployment)


@dataclass(frozen=True)
class Pms:
    """A PMS and its clinician, over the network."""

    node: Node
    client: httpx.AsyncClient
    owner: Pool

    def token(self, subject: str = "dr", role: str = "clinician") -> dict[str, str]:
        """Headers of a caller."""
        secret = read_service_environment(self.node.home)["DERM_TOKEN_SECRET"]
        token = mint_token(
            secret=secret, issuer="derm-cds", audience="derm-cds", subject=subject, roles=[role]
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

    async def until_none_pending(self) -> None:
        """Wait, without a hand, for every assessment to be finished."""
        since = time.monotonic()
        while await self.pending():
            assert time.monotonic() - since < _WHOLE_S, "assessments stayed pending"
            await asyncio.sleep(0.5)


def make_twin(original: Path, models: Path) -> None:
    """A second model to publish: the one in `original` in another embedding space, turned by a random rotation.

    Neighbours and similarities are those of the original as long as query and references are of one space; across
    the two they are noise, so an answer that mixed them would be seen.
    """
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(512, 512)))[0].astype(np.float32)

    def own_space(content: dict[str, Any]) -> None:
        content["spaces"][0]["embedding_space"] += ".turned"

    tag = f"{original.name.partition('.')[2]}twin"
    folder = models / copy_model(original, models, tag, own_space)
    transform = folder / read_manifest(folder).live_space.transform
    with np.load(transform) as arrays:
        mean, matrix = arrays["mean"], arrays["matrix"]
    transform.unlink()
    np.savez(transform, mean=mean, matrix=rotation @ matrix)
    turn_references(folder, lambda vectors: vectors @ rotation.T)
    seal(folder)


@pytest.fixture(scope="session")
def two_models(models: Path, model_id: str, tmp_path_factory) -> Path:
    """A store with the shipped model and its twin."""
    store = tmp_path_factory.mktemp("models")
    (store / model_id).symlink_to(models / model_id)
    make_twin(models / model_id, store)
    (store / DEFAULT_NAME).write_text(model_id)
    return store


@pytest.fixture(scope="session")
def twin_id(model_id: str) -> str:
    """The twin's id."""
    return f"{model_id}twin"


@pytest.fixture(scope="session")
async def node(two_models: Path) -> AsyncIterator[Node]:
    """The one running node."""
    home = new_home("derm-e2e-")
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            # Replicas find the models where their node was told to look.
            patch.setenv("DERM_MODELS", str(two_models))
            # Logical ones: room for a second replica of each deployment during an update, on any machine.
            patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')
            # The documented TLS proxy, on the node itself.
            patch.setenv("DERM_TRUSTED_PROXIES", "127.0.0.1")
            service = await stack.enter_async_context(graph_service(home))
        node = Node(home, two_models, await asyncio.to_thread(service.system.postgres.ensure), service)
        yield node
    shutil.rmtree(node.ray.directory, ignore_errors=True)


@pytest.fixture(scope="session")
def pms(node: Node) -> Pms:
    """A caller."""
    return Pms(node, node.service.target.client, node.service.target.owner)


@pytest.fixture(scope="session")
def lesion_image() -> Callable[..., bytes]:
    """Draw a lesion as a camera would send it: `(seed, size) -> JPEG`."""
    return lesion_jpeg


def draw_original(side: int, seed: int) -> bytes:
    """A square lesion under noise, as a PNG of three bytes a pixel: it does not compress, and no two are alike."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    dark = np.exp(-4 * (x**2 + y**2))[..., None] * np.array([110.0, 100.0, 95.0])
    skin = (np.array([205.0, 160.0, 140.0]) - dark).astype(np.uint8)
    noisy = skin + random.integers(0, 40, skin.shape, np.uint8)
    return encode(Image.fromarray(noisy), "PNG", compress_level=0)

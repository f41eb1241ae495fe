"""The whole service in this process: real database, real key store, real model, plain stages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from inspect import isawaitable
import io
import logging
from pathlib import Path
import threading
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
import httpx
import jsonschema
import numpy as np
from PIL import Image, ImageFilter
from pydantic import SecretStr
import pytest

from benchmarks.baseline import LocalStages
from cluster.postgres import DatabaseUrls
from data_jobs.references.load import publish_bundled
from deployments.preprocess.decode import UploadLimits
from serve_app.access.tokens import mint_token
from serve_app.domain.identifiers import is_opaque
from serve_app.http import services
from serve_app.http.app import create_app
from serve_app.lesions import recovery
from serve_app.lesions.assess import Stages
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.settings import Settings
from tests.serve_app.erasure.erasing import uploaded

SECRET = "a secret of the tests, long enough for HS256"
POLICY = "2026-11.4"
#: Everything an upload can leave behind.
TABLES = (
    *("lesions", "lesion_images", "lesion_embeddings", "assessments", "idempotency_keys"),
    "audit_events",
)


async def until(holds: Callable[[], Any], *, within_s: float = 60.0) -> Any:
    """Wait until something holds, or what it awaits does; returns what that is."""
    async with asyncio.timeout(within_s):
        while not (found := await value if isawaitable(value := holds()) else value):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
        return found


class Clock:
    """A clock that goes when a test moves it, seconds."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def logging_put_back(outside_serve: None) -> Iterator[None]:
    """Whatever is changed of the process's logging is as before after the test."""
    root, factory, hook = logging.getLogger(), logging.getLogRecordFactory(), threading.excepthook
    level, handlers = root.level, root.handlers[:]
    yield
    logging.setLogRecordFactory(factory)
    root.setLevel(level)
    root.handlers[:] = handlers
    threading.excepthook = hook


@pytest.fixture(scope="session")
async def service_urls(new_database, models: Path, model_id: str) -> DatabaseUrls:
    """A migrated database with the model's references, and the model live."""
    urls: DatabaseUrls = await new_database()
    await publish_bundled(urls.owner, models, model_id)
    return urls


@pytest.fixture(scope="session")
async def service_owner(service_urls: DatabaseUrls) -> AsyncIterator[Pool]:
    """The owner's pool: assigns care, counts rows."""
    pool = await open_pool(service_urls.owner, minimum=0, maximum=2, timeout_s=20)
    yield pool
    await pool.close()


@pytest.fixture(scope="session", autouse=True)
def recovery_when_asked() -> Iterator[None]:
    """What a test leaves pending is finished when it says so, and not by another application in the background."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "PERIOD_S", 86_400.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def readiness_looked_up_anew() -> Iterator[None]:
    """What a test changes, /readyz says at once; that it is kept for a second is test_health.py's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "READY_FOR_S", 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
async def nothing_left_pending(service_owner: Pool) -> AsyncIterator[None]:
    """What a module leaves pending is not finished in the background while the next one counts rows."""
    yield
    await service_owner.execute(
        "UPDATE assessments SET outcome = 'failed', failure = 'left_by_a_test', completed_at = now(),"
        " lease_until = NULL WHERE outcome = 'pending'"
    )


@pytest.fixture(scope="session")
def settings(service_urls: DatabaseUrls, models: Path, tmp_path_factory) -> Settings:
    """A node of its own."""
    return Settings(
        home=tmp_path_factory.mktemp("home"),
        database_url=SecretStr(service_urls.app),
        token_secret=SecretStr(SECRET),
        models=models,
        database_pool_max=6,
        # A test asks faster than a hospital; what the limits do is test_rate_limits.py's.
        rate_limit_per_s=1e6,
        rate_limit_burst=1_000_000,
        unauthenticated_per_minute=1_000_000,
        refusal_events_per_minute=1_000_000,
    )


@pytest.fixture(scope="session")
async def local_stages(service_urls: DatabaseUrls, models: Path) -> AsyncIterator[Callable[..., LocalStages]]:
    """Make plain stages; `answer_all` lets no image be refused as unfamiliar, whatever the model."""
    pool = await open_pool(service_urls.app, minimum=0, maximum=4)

    def make(*, min_side: int = 224, answer_all: bool = True, threads: int = 1) -> LocalStages:
        stages = LocalStages(
            models=models,
            references=ReferenceStore(pool),
            limits=UploadLimits(min_side=min_side),
            threads=threads,
            policy_version=POLICY,
        )
        if answer_all:
            stages._risk.override({"refusal": {"max_unknown": 1.0}})
        return stages

    yield make
    await pool.close()


@dataclass(frozen=True)
class Service:
    """A running application, and what a test asks of it."""

    app: FastAPI
    client: httpx.AsyncClient
    owner: Pool
    image: bytes
    document: dict[str, Any] = field(default_factory=dict)

    def token(self, subject: str, roles: tuple[str, ...] = ("clinician",), **claims: Any) -> dict[str, str]:
        """Headers of a caller."""
        values = {"secret": SECRET, "issuer": "derm-cds", "audience": "derm-cds", "roles": roles, **claims}
        return {"Authorization": f"Bearer {mint_token(subject=subject, **values)}"}

    async def care(self, subject: str = "dr", patient_id: str | None = None) -> str:
        """Put a patient into the caller's care; returns the patient."""
        patient_id = patient_id or f"p-{uuid4().hex[:12]}"
        since = datetime(2026, 1, 1, tzinfo=UTC)
        care = "INSERT INTO care_assignments VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"
        await self.owner.execute(care, patient_id, subject, since)
        return patient_id

    async def upload(
        self,
        patient_id: str,
        *,
        image: bytes | None = None,
        name: str = "lesion.png",
        subject: str = "dr",
        params: Any = None,
        headers: dict[str, str] | None = None,
        **fields: str,
    ) -> httpx.Response:
        """Send one image."""
        return await self.client.post(
            "/api/lesions",
            params=params,
            data={"patient_id": patient_id, **fields},
            files={"image": (name, self.image if image is None else image)},
            headers={**self.token(subject), **(headers or {})},
        )

    async def replay(
        self, answer: Mapping[str, Any], *, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """Ask for an answer to be made again."""
        return await self.client.post(
            f"/api/lesions/{answer['lesion_id']}/assessments/{answer['assessment_id']}/replay",
            headers=headers or self.token("dr"),
        )

    async def get(self, url: str, *, params: Any = None, **named: str) -> httpx.Response:
        """Ask as the clinician in charge, with these headers too."""
        return await self.client.get(url, params=params, headers={**self.token("dr"), **named})

    async def counts(self) -> dict[str, int]:
        """Rows of every table an upload writes to."""
        return {
            table: await self.owner.fetchval(f"SELECT count(*) FROM {table}")  # noqa: S608 - our own names
            for table in TABLES
        }

    @asynccontextmanager
    async def storing_nothing(self, *, events: int = 1) -> AsyncIterator[None]:
        """What is done meanwhile stores nothing but so many audit events."""
        before = await self.counts()
        yield
        assert await self.counts() == {**before, "audit_events": before["audit_events"] + events}

    async def events(self, response: httpx.Response) -> list[dict[str, Any]]:
        """The audit events of a request; purpose, and digests of rows, apart from the rest of their detail."""
        rows = await self.owner.fetch(
            "SELECT * FROM audit_events WHERE request_id = $1 ORDER BY event_id",
            response.headers["x-request-id"],
        )
        events = [{**row, "detail": dict(row["detail"])} for row in rows]
        apart = ("purpose", "rows")
        return [event | {name: event["detail"].pop(name, None) for name in apart} for event in events]

    async def hold_to_event(
        self,
        response: httpx.Response,
        action: str,
        outcome: str,
        *,
        about: Mapping[str, Any] | None = None,
        names: tuple[str, ...] = ("patient_id", "lesion_id", "image_id"),
        **detail: Any,
    ) -> dict[str, Any]:
        """Hold a request against its only audit event: the ids it names of an answer, and its detail, where given."""
        (event,) = await self.events(response)
        assert (event["action"], event["outcome"]) == (action, outcome)
        assert about is None or [str(event[name]) for name in names] == [about[name] for name in names]
        assert not detail or event["detail"] == detail
        return event

    async def hold_to_failure(
        self, response: httpx.Response, status: int, code: str, action: str
    ) -> dict[str, Any]:
        """Hold a problem and its only audit event against each other."""
        await self.hold_to_event(response, action, "failed", code=code)
        return self.hold_to_problem(response, status, code)

    def hold_to(self, schema: str, body: Any) -> None:
        """Hold a body against a schema of the published OpenAPI document."""
        jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{schema}", "components": self.document["components"]}
        ).validate(body)

    def hold_to_problem(self, response: httpx.Response, status: int, code: str) -> dict[str, Any]:
        """Hold an error against RFC 9457 and our own additions to it."""
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/problem+json"
        body: dict[str, Any] = response.json()
        self.hold_to("ProblemDocument", body)
        assert (body["status"], body["code"]) == (status, code), body
        assert body["type"] == f"urn:derm-cds:problem:{code}"
        (given,) = response.headers.get_list("x-request-id")
        assert is_opaque(body["request_id"])
        # A caller's free text comes back here, and nowhere else.
        assert body["request_id"] == given or not is_opaque(given)
        return body


StartService = Callable[..., AbstractAsyncContextManager[Service]]


@pytest.fixture(scope="session")
def start_service(settings: Settings, service_owner: Pool, local_stages, drawn_lesion) -> StartService:
    """Run an application over given stages or plain ones, with other settings where a test asks for them."""

    @asynccontextmanager
    async def start(
        stages: Stages | None = None,
        *,
        raise_app_exceptions: bool = True,
        observe: Any = None,
        **changed: object,
    ) -> AsyncIterator[Service]:
        app = create_app(settings.model_copy(update=changed), stages or local_stages(), observe=observe)
        transport = httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://derm", timeout=60) as client,
        ):
            service = Service(app, client, service_owner, drawn_lesion())
            found = await client.get("/api/openapi.json", headers=service.token("dr"))
            service.document.update(found.json())
            yield service

    return start


@pytest.fixture(scope="session")
async def service(start_service: StartService) -> AsyncIterator[Service]:
    """The service over all five real stages."""
    async with start_service() as service:
        yield service


@pytest.fixture
async def answer(service: Service) -> dict[str, Any]:
    """The answer to an image of a patient in care."""
    return await uploaded(service)


@pytest.fixture(scope="session")
def drawn_lesion() -> Callable[..., bytes]:
    """Draw a dark, uneven blotch on textured skin: `(seed, width, height, kind, **options) -> bytes`."""

    def draw(seed: int = 0, width: int = 400, height: int = 300, kind: str = "PNG", **options: Any) -> bytes:
        random = np.random.default_rng(seed)
        y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        angle, radius = np.arctan2(y, x + 0.1), np.hypot(y, x + 0.1)
        edge = 0.5 + 0.06 * np.sin(3 * angle + seed) + 0.04 * np.sin(7 * angle)
        inside = 1 / (1 + np.exp((radius - edge) * 30))
        net = 0.5 + 0.5 * np.sin(40 * x) * np.sin(37 * y)
        skin, brown = np.array([222.0, 176.0, 155.0]), np.array([96.0, 58.0, 44.0])
        colour = skin + (brown - skin) * (inside * (0.75 + 0.25 * net))[..., None]
        noise = random.normal(0, 9, (height, width, 1))
        pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6))
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return draw

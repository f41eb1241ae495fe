"""A PMS that goes on uploading while things break, the account of what it was promised, and the services it uploads to.

Every upload has an Idempotency-Key and is sent again until it is acknowledged. `lost`: acknowledged,
and at the end not readable and whole. `doubled`: one key, more than one record.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
import io
from pathlib import Path
import re
import tempfile
from threading import Event, Thread
import time
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
import httpx
import psutil
from pydantic import SecretStr

from benchmarks.baseline import LocalStages
from benchmarks.systems import System, prepare_records, running_graph
from cluster.node_files import read_service_environment
from cluster.ports import choose_port
from cluster.postgres import DatabaseUrls, EmbeddedPostgres, supervise
from data_jobs.sample_lesion import draw_lesion
from deployments.preprocess.decode import UploadLimits
from deployments.risk.policy import CURRENT_VERSION
from serve_app.http.app import create_app
from serve_app.lesions.recovery import recover_once
from serve_app.records.pool import Pool, open_pool
from serve_app.records.references import ReferenceStore
from serve_app.settings import Settings, model_folder

#: A service is whole again when this many uploads in a row, begun after the fault, were answered 201.
WHOLE_AFTER = 4
_PAUSE_S = 0.2
_CLINICIAN = "dr-faults"
#: The load's own rate is not what is tested here.
_NO_RATE_LIMIT = 1_000_000
_PROBLEM_FIELDS = {"type", "title", "status", "code", "detail", "request_id"}


@dataclass(frozen=True)
class Target:
    """A running service as its callers see it, and its database as its owner does."""

    client: httpx.AsyncClient
    headers: dict[str, str]
    patient: str
    owner: Pool
    #: Completes what is pending now; over Ray that is left to the service's own loop.
    recover: Callable[[], Awaitable[object]] | None = None


@dataclass
class Sent:
    """One upload: its key (also its encounter), its image, and the answer that acknowledged it."""

    key: str
    image: bytes
    at: float = field(default_factory=time.monotonic)
    answer: dict[str, Any] | None = None


@dataclass
class Account:
    """What came back, over all rounds of one kind."""

    acknowledged: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    untyped: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)

    def note(self, response: httpx.Response) -> None:
        """Count an answer; one that is neither 2xx nor a problem document is untyped."""
        name = str(response.status_code)
        if not response.is_success:
            name += f" {_problem_code(response) or 'untyped'}"
            if _problem_code(response) is None:
                self.untyped.append(f"{response.status_code}: {response.text[:200]}")
        self.answers[name] += 1


def _problem_code(response: httpx.Response) -> str | None:
    if response.headers.get("content-type") != "application/problem+json":
        return None
    try:
        body = response.json()
    except ValueError:
        return None
    whole = isinstance(body, dict) and set(body) >= _PROBLEM_FIELDS and body["status"] == response.status_code
    return str(body["code"]) if whole else None


class Load:
    """Uploads under way, `pause_s` between them; each is sent again, with its key, until it is acknowledged."""

    def __init__(self, target: Target, account: Account, *, pause_s: float = 0.0) -> None:
        self.target, self.account, self.pause_s = target, account, pause_s
        self.sent: list[Sent] = []
        self._images = [_draw(seed) for seed in range(4)]
        self._stopping = asyncio.Event()
        self._running: list[Sent] = []

    async def work(self) -> None:
        """Upload until stopped; what is under way then is still brought to its end."""
        while not self._stopping.is_set():
            await self.upload()
            await asyncio.sleep(self.pause_s)

    async def upload(self, *, give_up_after_s: float = 120.0) -> Sent:
        """Send one image until it is acknowledged."""
        one = Sent(uuid4().hex, self._images[len(self.sent) % len(self._images)])
        self.sent.append(one)
        deadline = time.monotonic() + give_up_after_s
        while one.answer is None and time.monotonic() < deadline:
            at = time.monotonic()
            response = await self._send(one)
            if response is not None and response.status_code in {201, 202}:
                one.answer = response.json()
                self.account.acknowledged += 1
            if response is not None and response.status_code == 201:
                one.at = at
                self._running.append(one)
                continue
            self._running.clear()
            await asyncio.sleep(_PAUSE_S)
        return one

    def whole_since(self, moment: float) -> bool:
        """Whether the last uploads, all begun after a moment, were answered 201 at their one try or retry."""
        latest = self._running[-WHOLE_AFTER:]
        return len(latest) == WHOLE_AFTER and all(one.at > moment for one in latest)

    async def until_whole(self, moment: float, *, give_up_after_s: float = 180.0) -> float:
        """Wait under load; seconds from the moment until the service was whole again."""
        while not self.whole_since(moment):
            if time.monotonic() - moment > give_up_after_s:
                raise TimeoutError(
                    f"not whole {give_up_after_s:.0f} s after the fault: {self.account.answers}"
                )
            await asyncio.sleep(0.02)
        return time.monotonic() - moment

    async def settle(self) -> None:
        """Wait until nothing is pending, then hold every acknowledged upload against the record."""
        await _until_none_pending(self.target)
        for one in self.sent:
            if one.answer is not None and not await self._is_whole(one):
                self.account.lost.append(one.key)
        rows = await self.target.owner.fetch(
            "SELECT encounter_id FROM lesion_images WHERE patient_id = $1"
            " GROUP BY encounter_id HAVING count(*) > 1",
            self.target.patient,
        )
        self.account.doubled.extend(row["encounter_id"] for row in rows)

    async def _send(self, one: Sent) -> httpx.Response | None:
        try:
            response = await self.target.client.post(
                "/api/lesions",
                data={"patient_id": self.target.patient, "encounter_id": one.key},
                files={"image": ("lesion.jpg", one.image)},
                headers={**self.target.headers, "Idempotency-Key": one.key},
            )
        except httpx.TransportError as error:
            self.account.answers[f"broken connection ({type(error).__name__})"] += 1
            return None
        self.account.note(response)
        return response

    async def _is_whole(self, one: Sent) -> bool:
        """Readable with its image, byte for byte, and finished: by its key and by its id."""
        assert one.answer is not None  # noqa: S101 - narrows for the type checker
        lesion = f"/api/lesions/{one.answer['lesion_id']}"
        again = await self._send(one)
        timeline = await self.target.client.get(lesion, headers=self.target.headers)
        image = await self.target.client.get(
            f"{lesion}/images/{one.answer['image_id']}", headers=self.target.headers
        )
        if again is None or (again.status_code, timeline.status_code, image.status_code) != (201, 200, 200):
            return False
        (kept,) = timeline.json()["assessments"]
        same = again.json()["assessment_id"] == kept["assessment_id"] == one.answer["assessment_id"]
        return same and kept["outcome"] != "pending" and image.content == one.image

    def stop(self) -> None:
        """Begin no further upload."""
        self._stopping.set()


@asynccontextmanager
async def under_load(
    target: Target, account: Account, *, concurrency: int, pause_s: float = 0.0
) -> AsyncIterator[Load]:
    """Keep so many uploads under way around a block; then settle the account."""
    load = Load(target, account, pause_s=pause_s)
    workers = [asyncio.create_task(load.work()) for _ in range(concurrency)]
    try:
        await load.until_whole(time.monotonic())
        yield load
    finally:
        load.stop()
        await asyncio.gather(*workers)
    await load.settle()


async def _until_none_pending(target: Target, *, give_up_after_s: float = 180.0) -> None:
    since = time.monotonic()
    while await target.owner.fetchval("SELECT count(*) FROM assessments WHERE outcome = 'pending'"):
        if time.monotonic() - since > give_up_after_s:
            return  # what is still pending counts as lost
        if target.recover is not None:
            await target.recover()
        await asyncio.sleep(0.5)


def _draw(seed: int) -> bytes:
    buffer = io.BytesIO()
    draw_lesion(size=(400, 300), seed=seed).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@dataclass(frozen=True)
class LocalService:
    """The application in this process over the plain stages, on a real PostgreSQL and key store."""

    app: FastAPI
    target: Target
    settings: Settings


@asynccontextmanager
async def local_service(home: Path, urls: DatabaseUrls) -> AsyncIterator[LocalService]:
    """Run the application on this database, which may be empty."""
    headers, patient, owner = await _fill(home, urls)
    settings = Settings(
        home=home,
        database_url=SecretStr(urls.app),
        token_secret=SecretStr(read_service_environment(home)["DERM_TOKEN_SECRET"]),
        models=model_folder(),
        database_pool_max=6,
        rate_limit_per_s=_NO_RATE_LIMIT,
        rate_limit_burst=_NO_RATE_LIMIT,
    )
    stages = LocalStages(
        models=settings.models,
        limits=UploadLimits(min_side=settings.min_side),
        threads=1,
        policy_version=CURRENT_VERSION,
    )
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

            yield LocalService(app, Target(client, headers, patient, owner, recover), settings)
    finally:
        await owner.close()


async def _fill(home: Path, urls: DatabaseUrls) -> tuple[dict[str, str], str, Pool]:
    """Fill the records: a caller's headers, a patient in its care, and the owner's pool."""
    patient = f"p-{uuid4().hex[:12]}"
    token = await asyncio.to_thread(prepare_records, home, urls, clinician=_CLINICIAN, patient=patient)
    owner = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    return {"Authorization": f"Bearer {token}"}, patient, owner


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
    headers, patient, owner = await _fill(home, await asyncio.to_thread(postgres.ensure))
    port, limit = choose_port(), str(_NO_RATE_LIMIT)
    settings = {"DERM_RATE_LIMIT_PER_S": limit, "DERM_RATE_LIMIT_BURST": limit}
    starting = running_graph(home, port=port, settings=settings)
    try:
        with supervised(postgres):
            system = await asyncio.to_thread(starting.__enter__)
            try:
                base = f"http://127.0.0.1:{port}"
                async with httpx.AsyncClient(base_url=base, timeout=60) as client:
                    yield GraphService(system, Target(client, headers, patient, owner))
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


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""

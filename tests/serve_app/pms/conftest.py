"""A PMS that listens, a token file for it, and a record to deliver from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest

from serve_app.domain.identifiers import new_id
from serve_app.pms.client import CircuitBreaker, PmsClient
from serve_app.pms.delivery import Delivery
from serve_app.pms.messages import pms_resources
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import Outbox
from serve_app.records.pool import Pool, open_pool
from serve_app.records.serving import LiveModel, publish
from tests.serve_app.pms.server import TOKEN, PmsServer, running_pms
from tests.serve_app.records.conftest import SPACE, admission, assessment, event, unit_vectors

__all__ = ["admission", "assessment", "event", "unit_vectors"]


@pytest.fixture
def pms() -> Iterator[PmsServer]:
    """A PMS of this test's own."""
    with running_pms() as server:
        yield server


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """The token, for our eyes only."""
    path = tmp_path / "pms.token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
async def client(pms: PmsServer, token_file: Path) -> AsyncIterator[PmsClient]:
    """The way to the PMS."""
    client = PmsClient(pms.url, token_file=token_file)
    yield client
    await client.close()


@dataclass(frozen=True)
class Queue:
    """Assessments on record that the PMS is to be told of, and what tells it."""

    lesions: LesionStore
    outbox: Outbox
    owner: Pool
    finish: Callable[..., Awaitable[UUID]]
    delivery: Callable[..., Delivery]

    async def drain(self, delivery: Delivery, *, within_s: float = 20.0) -> None:
        """Deliver until nothing waits."""
        async with asyncio.timeout(within_s):
            while (await self.outbox.counts()).waiting:
                await delivery.deliver_due(lease_s=0.05)
                await asyncio.sleep(0.01)

    async def disclosures(self) -> list[str]:
        """The assessments whose disclosure is on record, in its order."""
        rows = await self.owner.fetch(
            "SELECT assessment_id FROM audit_events WHERE action = 'disclose' ORDER BY event_id"
        )
        return [str(row["assessment_id"]) for row in rows]


@pytest.fixture
async def queue(new_database, admission, assessment, event, pms, client) -> AsyncIterator[Queue]:
    """A database of its own, and ways to fill and empty its outbox."""
    database = await new_database()
    owner = await open_pool(database.owner, minimum=0, maximum=1, timeout_s=20)
    pool = await open_pool(database.app, minimum=1, maximum=6, timeout_s=20)
    await publish(owner, LiveModel("lite0.a", "digest", SPACE))
    lesions, outbox = LesionStore(pool), Outbox(pool)
    pms.register("patient", "e-0", "e-1", "e-2", "e-3")

    async def finish(encounter_id: str | None, **changed: object) -> UUID:
        new = admission(encounter_id=encounter_id, patient_id="patient")
        await lesions.admit(new)
        named = {"embedding_space": SPACE, "message_id": new_id()}
        done = event("classify", assessment_id=new.assessment_id)
        await lesions.complete(new.assessment_id, assessment(**changed), event=done, **named)
        return new.assessment_id

    def delivery(**changed: object) -> Delivery:
        values = {
            "outbox": outbox,
            "records": lesions,
            "client": client,
            "resources": pms_resources(pool, pms_url=pms.url),
            "dead_after": timedelta(days=7),
            "breaker": CircuitBreaker(failures=8, rest_s=0.02),
            "first_wait_s": 0.01,
            "timeout_s": 2.0,
        }
        return Delivery(**values | changed)

    yield Queue(lesions, outbox, owner, finish, delivery)
    await pool.close()
    await owner.close()

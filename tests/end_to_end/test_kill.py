"""`kill -9` under load: nothing acknowledged is lost, and the service is whole again without a hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
import time
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

CONCURRENCY = 4
#: The service is whole again within this many seconds.
WHOLE_S = 60.0


@dataclass
class Sent:
    """One upload: what was sent, under which key, and what came back (None: the connection broke)."""

    key: str
    image: bytes
    at: float
    response: httpx.Response | None = None

    @property
    def acknowledged(self) -> bool:
        return self.response is not None and self.response.status_code in {201, 202}


@dataclass
class Load:
    """A PMS that goes on uploading, four at a time, whatever happens."""

    pms: Any
    patient: str
    images: list[bytes]
    sent: list[Sent] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def work(self) -> None:
        while not self.stopped.is_set():
            one = Sent(uuid4().hex, self.images[len(self.sent) % len(self.images)], time.monotonic())
            self.sent.append(one)
            await self.send(one)
            if not one.acknowledged:
                await asyncio.sleep(0.2)

    async def send(self, one: Sent) -> None:
        try:
            one.response = await self.pms.upload(
                self.patient, one.image, headers={"Idempotency-Key": one.key}
            )
        except httpx.TransportError:
            one.response = None

    async def until(self, enough: Callable[[], bool], seconds: float, what: str) -> float:
        """Wait under load; returns the seconds it took."""
        since = time.monotonic()
        while not enough():
            assert time.monotonic() - since < seconds, f"{what}: {self.statuses()}"
            await asyncio.sleep(0.05)
        return time.monotonic() - since

    def whole_since(self, moment: float, *, enough: int = 12) -> bool:
        """Whether the last uploads begun after a moment were all answered."""
        later = [one for one in self.sent if one.at > moment and one.response is not None]
        return len(later) >= enough and all(one.response.status_code == 201 for one in later[-enough:])

    def statuses(self) -> dict[object, int]:
        found = Counter(one.response.status_code if one.response else "broken" for one in self.sent)
        return dict(found)


@asynccontextmanager
async def under_load(pms, images: list[bytes]) -> AsyncIterator[Load]:
    """Run the load around a block, then let what is under way finish."""
    load = Load(pms, await pms.care(), images)
    workers = [asyncio.create_task(load.work()) for _ in range(CONCURRENCY)]
    try:
        await load.until(lambda: sum(one.acknowledged for one in load.sent) >= 8, 40, "before the kill")
        yield load
    finally:
        load.stopped.set()
        await asyncio.gather(*workers)


async def hold_to_promises(pms, load: Load) -> None:
    """Everything acknowledged is there with its image, everything is finished, and a retry is no second record."""
    for one in load.sent:
        if one.response is not None and not one.acknowledged:
            assert one.response.status_code >= 500, one.response.text
    acknowledged = [one for one in load.sent if one.acknowledged]
    stored = {
        str(row["assessment_id"]): row["outcome"]
        for row in await pms.owner.fetch(
            "SELECT a.assessment_id, a.outcome FROM assessments AS a JOIN lesion_images AS i USING (image_id)"
            " WHERE i.patient_id = $1",
            load.patient,
        )
    }
    for one in acknowledged:
        answer = one.response.json()
        assert answer["assessment_id"] in stored
        if one.response.status_code == 201:
            assert stored[answer["assessment_id"]] == answer["outcome"]
    for one in acknowledged[:: max(1, len(acknowledged) // 25)]:
        assert await pms.original(one.response.json()) == one.image
    for one in load.sent:
        if not one.acknowledged:
            await load.send(one)
            assert one.acknowledged, one.response
    records = await pms.owner.fetchval(
        "SELECT count(*) FROM lesion_images WHERE patient_id = $1", load.patient
    )
    assert records == len(load.sent)


@pytest.mark.parametrize(
    "deployment", ["preprocess", "classifier", "embedder", "retriever", "risk", "ingress"]
)
async def test_a_replica_killed_under_load(pms, node, lesion_image, capsys, deployment: str) -> None:
    images = [lesion_image(seed) for seed in range(4)]
    async with under_load(pms, images) as load:
        replicas = node.replicas(deployment)
        assert replicas, f"no replica of {deployment}"
        killed = time.monotonic()
        for replica in replicas:
            replica.kill()
        await load.until(lambda: bool(node.replicas(deployment)), WHOLE_S, "no new replica")
        back = time.monotonic()
        await load.until(lambda: load.whole_since(back), WHOLE_S, "not whole")
        took = time.monotonic() - killed
        assert took < WHOLE_S
        assert {replica.pid for replica in node.replicas(deployment)}.isdisjoint(
            replica.pid for replica in replicas
        )
    await hold_to_promises(pms, load)
    with capsys.disabled():
        print(f"\nkill -9 {deployment}: whole after {took:.1f} s, {load.statuses()}")


async def test_what_the_kills_left_pending_is_finished_without_a_hand(pms, capsys) -> None:
    waiting = await pms.pending()
    took = await pms.until_none_pending()
    with capsys.disabled():
        print(f"\n{waiting} pending after the kills, none after {took:.1f} s")


async def test_postgres_killed_under_load(pms, node, supervised, lesion_image, capsys) -> None:
    images = [lesion_image(seed) for seed in range(4)]
    async with under_load(pms, images) as load:
        postmaster = node.postgres.pid()
        assert postmaster is not None
        killed = time.monotonic()
        for process in [psutil.Process(postmaster), *psutil.Process(postmaster).children(recursive=True)]:
            process.kill()
        await load.until(lambda: node.postgres.pid() not in {None, postmaster}, WHOLE_S, "no server")
        back = time.monotonic()
        await load.until(lambda: load.whole_since(back), WHOLE_S, "not whole")
        took = time.monotonic() - killed
        assert took < WHOLE_S
    await hold_to_promises(pms, load)
    await pms.until_none_pending()
    for one in load.sent:
        if one.response is not None and one.response.status_code == 503:
            assert int(one.response.headers["retry-after"]) > 0
    with capsys.disabled():
        print(f"\nkill -9 postgres: whole after {took:.1f} s, {load.statuses()}")

"""`kill -9` under load: nothing acknowledged is lost or doubled, and the service is whole again without a hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
import time

import psutil
import pytest

from benchmarks.faults_load import Account, Load, Target, under_load
from tests.end_to_end.conftest import DEPLOYMENTS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

#: The service is whole again within this many seconds.
WHOLE_S = 60.0


@asynccontextmanager
async def loaded(pms, account: Account) -> AsyncIterator[Load]:
    """A PMS that goes on uploading; afterwards every image it was promised is held against the record."""
    target = Target(pms.client, pms.token(), await pms.care(), pms.owner)
    async with under_load(target, account, concurrency=3, pause_s=0.4) as load:
        yield load
    assert await pms.pending() == 0
    assert account.acknowledged
    assert (account.lost, account.doubled, account.untyped) == ([], [], [])
    # Nothing that was sent is refused for a fault of ours but with a 5xx.
    assert all(answer[0] in "25b" for answer in account.answers), account.answers


async def back(load: Load, killed: list[psutil.Process], running: Callable[[], set[int]]) -> float:
    """Wait until others run in the place of those killed, and uploads are answered; the seconds it took."""
    moment = time.monotonic()
    for process in killed:
        process.kill()
    gone = {process.pid for process in killed}
    while not (now := running()) or now & gone:
        assert time.monotonic() - moment < WHOLE_S, load.account.answers
        await asyncio.sleep(0.05)
    return await load.until_whole(moment, give_up_after_s=WHOLE_S)


async def test_each_replica_killed_under_load(pms, node, capsys) -> None:
    account = Account()
    took = {}
    async with loaded(pms, account) as load:
        for deployment in DEPLOYMENTS:
            replicas = node.replicas(deployment)
            assert replicas, f"no replica of {deployment}"
            took[deployment] = await back(
                load, replicas, lambda name=deployment: {replica.pid for replica in node.replicas(name)}
            )
    with capsys.disabled():
        said = {name: round(seconds, 1) for name, seconds in took.items()}
        print(f"\nkill -9, whole after s: {said}, {dict(account.answers)}")


async def test_postgres_killed_under_load(pms, node, capsys) -> None:
    account = Account()
    async with loaded(pms, account) as load:
        postmaster = psutil.Process(node.postgres.pid())
        killed = [postmaster, *postmaster.children(recursive=True)]
        took = await back(load, killed, lambda: {node.postgres.pid()} - {None})
    with capsys.disabled():
        print(f"\nkill -9 postgres: whole after {took:.1f} s, {dict(account.answers)}")

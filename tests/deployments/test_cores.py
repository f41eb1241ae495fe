"""The replicas of a stage on one machine do not want more cores together than it has."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from threading import Barrier, get_ident
from uuid import uuid4

import pytest

from deployments.cores import SharedCores

_REPLICA = """
import sys
from deployments.cores import SharedCores
replica = SharedCores(sys.argv[1])
print(replica.share(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("cores")
def test_replicas_times_jobs_times_threads_is_what_there_is() -> None:
    stage = f"test-{uuid4()}"
    replicas = [SharedCores(stage, threads=2) for _ in range(2)]
    other = SharedCores(f"{stage}-another")
    assert [replica.share() for replica in replicas] == [2, 2]
    assert other.share() == 8
    replicas += [SharedCores(stage, threads=2) for _ in range(4)]
    assert {replica.share() for replica in replicas} == {1}
    for replica in replicas[1:]:
        replica.close()
    assert replicas[0].share() == 4
    capped = SharedCores(f"{stage}-capped", most=3)
    assert capped.share() == 3
    for replica in (replicas[0], other, capped):
        replica.close()


@pytest.mark.usefixtures("cores")
def test_a_replica_that_was_killed_gives_its_share_back() -> None:
    stage = f"test-{uuid4()}"
    mine = SharedCores(stage)
    with subprocess.Popen(
        [sys.executable, "-c", _REPLICA, stage], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert int(other.stdout.readline()) >= 1
        assert mine.share() == 4
        other.kill()
    assert mine.share() == 8
    mine.close()


@pytest.mark.usefixtures("cores")
async def test_what_was_begun_is_finished_when_the_share_changes() -> None:
    mine = SharedCores(f"test-{uuid4()}", most=2)
    together = Barrier(3)

    def job() -> int:
        together.wait(30)
        return get_ident()

    begun = [asyncio.create_task(mine.run(job)) for _ in range(2)]
    await asyncio.sleep(0)
    other = SharedCores(mine._stage, threads=4)
    mine._threads = 4
    assert mine.share() == 1
    await asyncio.to_thread(together.wait, 30)
    assert len(set(await asyncio.gather(*begun))) == 2
    assert await mine.run(len, "go on") == 5
    mine.close()
    other.close()

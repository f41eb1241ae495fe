"""One row says which model answers."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from serve_app.audit.events import os_account
from serve_app.domain.errors import Conflict, DermError
from serve_app.records.pool import open_pool
from serve_app.records.serving import (
    Approval,
    LiveModel,
    announced,
    forget_replica,
    live_model,
    publications,
    publish,
    publish_when_ready,
    report_replica,
)


async def test_the_row_flips_whole(pool, owner_pool) -> None:
    assert await live_model(pool) is None
    models = [LiveModel(f"lite0.{i}", f"digest-{i}", f"space-{i % 2}") for i in range(6)]
    await publish(owner_pool, models[0])
    await publish(owner_pool, models[0])
    assert await live_model(pool) == models[0]
    await asyncio.gather(*(publish(owner_pool, model) for model in models))
    assert await live_model(pool) in models
    await publish(owner_pool, models[3])
    assert await live_model(pool) == models[3]
    assert await owner_pool.fetchval("SELECT count(*) FROM serving") == 1


@pytest.fixture
async def owner(new_database):
    """The owner's pool of a database in which nothing was published."""
    pool = await open_pool((await new_database()).owner, minimum=0, maximum=2)
    yield pool
    await pool.close()


async def test_every_change_of_the_model_is_an_event_with_what_was_before(owner) -> None:
    first, second = LiveModel("lite0.a", "digest-a", "space-a"), LiveModel("lite0.b", "digest-b", "space-b")
    await publish(owner, first)
    await publish(owner, first)  # answers already: no change, no event
    await publish(owner, second, Approval("promote", "Dr Test", "annual update", "a" * 64))
    newest, _ = await publications(owner)
    await publish(
        owner, first, Approval("rollback", "Dr Test", "complaints", takes_back=newest.publication_id)
    )
    rows = await owner.fetch("SELECT * FROM audit_events ORDER BY event_id")
    assert [row["action"] for row in rows] == ["model_publish", "model_promote", "model_rollback"]
    assert {(row["actor"], row["outcome"], row["patient_id"]) for row in rows} == {
        (os_account(), "success", None)
    }
    published, promoted, rolled_back = (row["detail"] for row in rows)
    assert (published["before"], published["after"]) == (None, first.identity)
    assert promoted == {
        "before": first.identity,
        "after": second.identity,
        "publication_id": newest.publication_id,
        "approved_by": "Dr Test",
        "reason": "annual update",
        "report_sha256": "a" * 64,
        "takes_back": None,
        "purpose": "HSYSADMIN",
    }
    assert (rolled_back["after"], rolled_back["takes_back"]) == (first.identity, newest.publication_id)


async def test_a_change_that_cannot_be_audited_does_not_happen(owner) -> None:
    first = LiveModel("lite0.a", "digest-a", "space-a")
    await publish(owner, first)
    await owner.execute("ALTER TABLE audit_events ADD CONSTRAINT full_disk CHECK (event_id < 0) NOT VALID")
    with pytest.raises((DermError, asyncpg.PostgresError)):
        await publish(owner, LiveModel("lite0.b", "digest-b", "space-b"))
    assert await live_model(owner) == first
    assert [publication.model for publication in await publications(owner)] == [first]


NOW, NEXT = LiveModel("lite0.a", "digest-a", "space-a"), LiveModel("lite0.b", "digest-b", "space-b")


@pytest.fixture
async def service(new_database):
    """The pools of a database in which `NOW` answers: the owner's, and the service's own."""
    urls = await new_database()
    owner, app = [await open_pool(url, minimum=0, maximum=2) for url in (urls.owner, urls.app)]
    await publish(owner, NOW)
    yield owner, app
    await owner.close()
    await app.close()


async def _candidate(pool):
    async with asyncio.timeout(30):
        while True:
            if (candidate := await announced(pool)) is not None:
                return candidate
            await asyncio.sleep(0.05)


async def test_without_a_running_service_the_row_flips_at_once(service) -> None:
    owner, app = service
    # Gone without a word: it is not waited for.
    await report_replica(app, uuid4(), ready=None, fault=None)
    await owner.execute("UPDATE serving_replicas SET seen_at = now() - interval '1 minute'")
    await publish_when_ready(owner, NEXT, over=NOW)
    assert await live_model(app) == NEXT
    assert await announced(app) is None


async def test_the_row_flips_when_every_replica_is_ready(service) -> None:
    owner, app = service
    replicas = [uuid4(), uuid4()]
    for replica in replicas:
        await report_replica(app, replica, ready=None, fault=None)
    flipping = asyncio.create_task(publish_when_ready(owner, NEXT, over=NOW))
    candidate = await _candidate(app)
    assert candidate.model == NEXT
    await report_replica(app, replicas[0], ready=candidate.announcement, fault=None)
    await asyncio.sleep(1.0)
    assert not flipping.done()
    assert await live_model(app) == NOW
    await report_replica(app, replicas[1], ready=candidate.announcement, fault=None)
    await flipping
    assert await live_model(app) == NEXT
    assert await announced(app) is None


async def test_a_replica_that_is_never_ready_keeps_the_row_as_it_is(service) -> None:
    owner, app = service
    replica = uuid4()
    # Ready for what was announced earlier, which is another thing.
    await report_replica(app, replica, ready=uuid4(), fault="lite0.b does not exist.")
    with pytest.raises(Conflict, match=r"lite0\.b is ready in 0 of 1 replicas .* lite0\.b does not exist\."):
        await publish_when_ready(owner, NEXT, over=NOW, within_s=0.5)
    assert await live_model(app) == NOW
    assert await announced(app) is None
    assert [entry.model for entry in await publications(owner)] == [NOW]
    await forget_replica(app, replica)
    await publish_when_ready(owner, NEXT, over=NOW, within_s=0.5)
    assert await live_model(app) == NEXT


async def test_of_two_models_that_are_made_ready_the_later_goes_on(service) -> None:
    owner, app = service
    replica, later = uuid4(), LiveModel("lite0.c", "digest-c", "space-c")
    await report_replica(app, replica, ready=None, fault=None)
    first = asyncio.create_task(publish_when_ready(owner, NEXT, over=NOW))
    await _candidate(app)
    second = asyncio.create_task(publish_when_ready(owner, later, over=NOW))
    with pytest.raises(Conflict, match="another model"):
        await first
    candidate = await announced(app)
    assert candidate is not None
    await report_replica(app, replica, ready=candidate.announcement, fault=None)
    await second
    assert await live_model(app) == later

"""One row says which model answers."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

import asyncpg
import pytest

from serve_app.domain.errors import DermError
from serve_app.records.pool import open_pool
from serve_app.records.serving import Approval, LiveModel, live_model, publications, publish
from serve_app.security.audit import os_account


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
    assert (published["before"], published["after"]) == (None, asdict(first))
    assert (
        promoted.items()
        >= {
            "before": asdict(first),
            "after": asdict(second),
            "publication_id": newest.publication_id,
            "approved_by": "Dr Test",
            "reason": "annual update",
            "report_sha256": "a" * 64,
        }.items()
    )
    assert (rolled_back["after"], rolled_back["takes_back"]) == (asdict(first), newest.publication_id)


async def test_a_change_that_cannot_be_audited_does_not_happen(owner) -> None:
    first = LiveModel("lite0.a", "digest-a", "space-a")
    await publish(owner, first)
    await owner.execute("ALTER TABLE audit_events ADD CONSTRAINT full_disk CHECK (event_id < 0) NOT VALID")
    with pytest.raises((DermError, asyncpg.PostgresError)):
        await publish(owner, LiveModel("lite0.b", "digest-b", "space-b"))
    assert await live_model(owner) == first
    assert [publication.model for publication in await publications(owner)] == [first]


async def test_only_the_owner_publishes(pool) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await publish(pool, LiveModel("mine", "digest", "space"))

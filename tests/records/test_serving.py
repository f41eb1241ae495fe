"""One row says which model answers."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from serve_app.records.serving import LiveModel, live_model, publish


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


async def test_only_the_owner_publishes(pool) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await publish(pool, LiveModel("mine", "digest", "space"))

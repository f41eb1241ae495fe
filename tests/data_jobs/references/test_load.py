"""The shipped references: loaded once, again when the model's folder changed, and never by halves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_jobs.references.load import publish_bundled
from model_store.registry import ModelStore
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import live_model, publish


async def test_references_load_once_and_again_for_a_rebuilt_folder(
    new_database, models: Path, model_id: str
) -> None:
    urls = await new_database()
    space = ModelStore(models).open(model_id).manifest.live_space
    assert await publish_bundled(urls.owner, models, model_id) == space.count
    assert await publish_bundled(urls.owner, models, model_id) == 0
    pool = await open_pool(urls.owner, minimum=0, maximum=1)
    try:
        answering = await live_model(pool)
        assert answering is not None
        # As if an earlier build of the same model, of as many references, had been published.
        await publish(pool, replace(answering, model_digest="0" * 64))
        assert await publish_bundled(urls.owner, models, model_id) == space.count
        assert await live_model(pool) == answering
        assert await ReferenceStore(pool).count(space.embedding_space) == space.count
    finally:
        await pool.close()

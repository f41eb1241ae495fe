"""What a run reports is of its own folder, whatever else fills the space."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from data_jobs.references.catalogue import read_catalogue
from data_jobs.references.embed.job import count_done, run_job
from data_jobs.references.embed.pipeline import ReferenceSink, Target
from data_jobs.references.embed.resources import Resources
from data_jobs.references.embedder import identify_embedder, space_spec
from model_store.registry import ModelStore
from serve_app.records.pool import open_pool
from serve_app.records.reference_cache import FailedReference, ReferenceCache
from serve_app.records.references import ReferenceImage

IMAGES = 6


@pytest.fixture
async def filled(make_folder, new_database, models: Path, model_id: str):
    """A folder whose images are in the space, beside a failure of another folder's: folder, target, owner's URL."""
    folder, urls = make_folder(IMAGES), await new_database()
    model = ModelStore(models).open(model_id)
    spec = space_spec(model, None)
    names = [field.name for field in fields(ReferenceImage)]
    images = [
        ReferenceImage(**{name: getattr(entry, name) for name in names}) for entry in read_catalogue(folder)
    ]
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    try:
        cache = ReferenceCache(pool)
        await cache.begin(identify_embedder(model, spec), expected=IMAGES)
        lost = FailedReference("ISIC_9999999", "undecodable_image", "another folder's")
        await cache.take_in(
            spec.embedding_space, images, np.eye(IMAGES, 512, dtype=np.float32), failures=[lost]
        )
    finally:
        await pool.close()
    return folder, Target(models, model_id, spec.embedding_space), urls.owner


def test_another_folders_failures_are_not_this_runs(filled) -> None:
    folder, target, dsn = filled
    said: list[str] = []
    report = run_job(folder, target, dsn, Resources(actors=1), pictures=False, say=said.append)
    assert (report.expected, report.found, report.embedded) == (IMAGES, IMAGES, 0)
    assert report.failures == {}
    assert said[-1].startswith(f"{IMAGES} of {IMAGES} images (100.0 %)")
    assert said[-1].endswith("none failed")


async def test_an_image_of_the_folder_that_failed_is_counted_once(filled) -> None:
    folder, target, dsn = filled
    names = {entry.isic_id for entry in read_catalogue(folder)}
    lost = FailedReference(min(names), "altered", "its picture is away, its vector is there")
    pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=20)
    try:
        cache = ReferenceCache(pool)
        await cache.take_in(target.embedding_space, [], np.empty((0, 512), np.float32), failures=[lost])
        assert await count_done(cache, target.embedding_space, names) == (IMAGES - 1, {"altered": 1})
        assert await count_done(cache, target.embedding_space, {"ISIC_9999999"}) == (
            0,
            {"undecodable_image": 1},
        )
    finally:
        await pool.close()


def test_the_sink_shows_no_password(filled) -> None:
    _, target, dsn = filled
    sink = ReferenceSink(dsn, target.embedding_space, rows_per_write=256)
    assert dsn not in f"{sink!r} {sink} {vars(sink)} {sink.get_name()}"

"""A space is filled piece by piece, by one embedder, and dropped only when nobody answers in it."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from serve_app.domain.errors import Conflict, NotFound
from serve_app.records.pool import open_pool
from serve_app.records.references import (
    FailedReference,
    ReferenceCache,
    ReferenceImage,
    ReferencePicture,
    ReferenceStore,
    SpaceEmbedder,
)
from serve_app.records.serving import LiveModel, publish
from tests.serve_app.records.conftest import reference_image

EMBEDDER = SpaceEmbedder("filled.1", "lite0.a", "a" * 64, "1")


def picture(image: ReferenceImage, jpeg: bytes = b"\xff\xd8\xff") -> ReferencePicture:
    return ReferencePicture(image.isic_id, 100, 75, sha256(jpeg).hexdigest(), jpeg)


@pytest.fixture
async def cache(new_database):
    """An owner's cache in a database of its own."""
    urls = await new_database()
    pool = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    yield ReferenceCache(pool), pool
    await pool.close()


async def test_filling_is_resumable_and_doing_it_twice_is_doing_it_once(cache, unit_vectors) -> None:
    references, pool = cache
    images, vectors = [reference_image(n) for n in range(20)], unit_vectors(20)
    await references.begin(EMBEDDER, expected=21)
    lost = FailedReference("ISIC_0000099", "undecodable_image", "broken")
    for _ in range(2):
        await references.take_in(
            "filled.1", images[:10], vectors[:10], pictures=[picture(images[0])], failures=[lost]
        )
    assert await references.present("filled.1", with_picture=False) == {i.isic_id for i in images[:10]}
    assert await references.present("filled.1", with_picture=True) == {images[0].isic_id}
    assert await references.failures("filled.1") == {"ISIC_0000099": "undecodable_image"}
    (summary,) = await references.spaces()
    assert (summary.images, summary.failures, summary.completed_at) == (10, 1, None)

    await references.begin(EMBEDDER, expected=21)
    mended = reference_image(99)
    await references.take_in("filled.1", [*images[10:], mended], unit_vectors(21)[10:])
    await references.complete("filled.1")
    (summary,) = await references.spaces()
    assert (summary.images, summary.failures, summary.images_expected) == (21, 0, 21)
    assert summary.completed_at is not None
    found = await ReferenceStore(pool).nearest(vectors[3], embedding_space="filled.1", k=1)
    assert found.similar[0].isic_id == images[3].isic_id
    assert await references.count_unfit("filled.1") == 0


async def test_what_two_embedders_made_never_lies_in_one_space(cache, unit_vectors) -> None:
    references, _ = cache
    await references.begin(EMBEDDER, expected=1)
    await references.take_in("filled.1", [reference_image(1)], unit_vectors(1))
    with pytest.raises(Conflict, match=r"another build of lite0\.a"):
        await references.begin(replace(EMBEDDER, digest="b" * 64), expected=1)
    assert (await references.embedder("filled.1")) == EMBEDDER
    await references.drop("filled.1")
    await references.begin(replace(EMBEDDER, digest="b" * 64), expected=1)


async def test_dropping_refuses_the_live_space_and_leaves_the_others(cache, unit_vectors) -> None:
    references, pool = cache
    shared, alone = reference_image(1), reference_image(2)
    await references.begin(EMBEDDER, expected=2)
    await references.take_in("filled.1", [shared, alone], unit_vectors(2), pictures=[picture(alone)])
    other = SpaceEmbedder("filled.2", "lite0.b", "b" * 64, "1")
    await references.begin(other, expected=1)
    await references.take_in("filled.2", [shared], unit_vectors(1))
    await publish(pool, LiveModel("lite0.a", "digest", "filled.1"))
    with pytest.raises(Conflict, match="live model answers in"):
        await references.drop("filled.1")
    await publish(pool, LiveModel("lite0.b", "digest", "filled.2"))
    assert await references.drop("filled.1") == 2
    assert await pool.fetchval("SELECT array_agg(isic_id) FROM reference_images") == [shared.isic_id]
    assert await pool.fetchval("SELECT count(*) FROM reference_pictures") == 0
    assert await references.present("filled.2", with_picture=False) == {shared.isic_id}
    with pytest.raises(NotFound, match="nothing in a space"):
        await references.drop("filled.1")


async def test_what_is_loaded_embedded_and_dropped_is_on_record_and_dropped_with_its_indexes(
    cache, unit_vectors
) -> None:
    references, pool = cache
    newest = await pool.fetchval("SELECT coalesce(max(event_id), 0) FROM audit_events")
    names = "SELECT count(*) FROM pg_indexes WHERE indexname LIKE 'reference\\_hnsw\\_%'"
    images = [reference_image(n) for n in range(40)]
    store = ReferenceStore(pool, exact_below=5)
    await store.load(images, unit_vectors(40), embedding_space="told", replace=True)
    assert await pool.fetchval(names) == 2
    await references.complete("told")
    await references.drop("told")
    assert await pool.fetchval(names) == 0
    with pytest.raises(NotFound):
        await references.drop("told")  # changes nothing, and is no event
    rows = await pool.fetch(
        "SELECT action, detail FROM audit_events WHERE event_id > $1 ORDER BY event_id", newest
    )
    assert [row["action"] for row in rows] == ["references_load", "references_embed", "references_drop"]
    assert {(row["detail"]["embedding_space"], row["detail"]["references"]) for row in rows} == {("told", 40)}


async def test_a_load_that_replaces_leaves_nothing_else(cache, unit_vectors) -> None:
    references, pool = cache
    store = ReferenceStore(pool)
    vectors = unit_vectors(3)
    await store.load([reference_image(1), reference_image(2)], vectors[:2], embedding_space="s")
    await store.load([reference_image(2), reference_image(3)], vectors[1:], embedding_space="s", replace=True)
    assert await references.present("s", with_picture=False) == {"ISIC_0000002", "ISIC_0000003"}
    sample = await references.sample("s", 5)
    assert {name for name, _ in sample} == {"ISIC_0000002", "ISIC_0000003"}
    assert all(np.isclose(np.linalg.norm(vector), 1, atol=1e-3) for _, vector in sample)

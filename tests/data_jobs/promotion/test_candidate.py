"""A candidate's space before its row flips: whatever lies in it is its own, whole and checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from data_jobs.promotion.candidate import PromotionRefused, fill_space, require_references, require_verified
from data_jobs.promotion.promotion import PromotionRequest, promote
from data_jobs.references.embedder import identify_embedder
from data_jobs.references.load import ReferenceBundle, read_bundle
from model_store.registry import ModelStore, StoredModel
from serve_app.records.pool import Pool
from serve_app.records.references import (
    FailedReference,
    ReferenceCache,
    ReferenceStore,
    SpaceEmbedder,
    SpaceSummary,
)
from serve_app.records.serving import live_model
from tests.pools import connected


@pytest.fixture
async def pool(served: str) -> AsyncIterator[Pool]:
    async with connected(served) as pool:
        yield pool


@pytest.fixture
def candidate(store, make_candidate) -> StoredModel:
    return ModelStore(store).open(make_candidate(store))


def space_of(model: StoredModel) -> str:
    return model.manifest.live_space.embedding_space


def strangers(model: StoredModel, count: int) -> ReferenceBundle:
    """References that the bundle does not have, with vectors of nobody's making."""
    bundle = read_bundle(model, model.manifest.live_space)
    images = [
        replace(bundle.images[n % len(bundle.images)], isic_id=f"ISIC_99{n:05}", lesion_id=f"IL_99{n:05}")
        for n in range(count)
    ]
    vectors = np.random.default_rng(7).normal(size=(count, 512)).astype(np.float32)
    return ReferenceBundle(images, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


async def summary_of(pool: Pool, space: str) -> SpaceSummary:
    return next(s for s in await ReferenceCache(pool).spaces() if s.embedding_space == space)


async def put(pool: Pool, space: str, bundle: ReferenceBundle) -> None:
    await ReferenceStore(pool).load(bundle.images, bundle.embeddings, embedding_space=space)


@pytest.mark.parametrize(("known", "count"), [(True, 20), (False, 400)])
async def test_what_another_embedder_left_is_replaced(pool, candidate, known, count) -> None:
    space, bundled = space_of(candidate), candidate.manifest.live_space.count
    await put(pool, space, strangers(candidate, count))
    cache = ReferenceCache(pool)
    if known:
        other = SpaceEmbedder(space, candidate.manifest.model_id, "f" * 64, "0")
        await cache.begin(other, expected=count)
        lost = [FailedReference(f"ISIC_98{n:05}", "unreadable", "broken") for n in range(9)]
        await cache.take_in(space, [], np.empty((0, 512), np.float32), failures=lost)
        await cache.complete(space)
    live = await live_model(pool)
    assert live is not None
    await require_references(pool, candidate, live)

    assert await fill_space(pool, candidate) == f"{bundled} references loaded into {space}"

    there = await cache.present(space, with_picture=False)
    own = read_bundle(candidate, candidate.manifest.live_space)
    assert there == {image.isic_id for image in own.images}
    assert await cache.embedder(space) == identify_embedder(candidate, candidate.manifest.live_space)
    assert await cache.failures(space) == {}
    await require_verified(pool, candidate)


async def test_strangers_do_not_count_as_references_that_will_be_found(pool, store, candidate) -> None:
    live = await live_model(pool)
    assert live is not None
    bundle = strangers(candidate, 400)
    await put(pool, live.embedding_space, bundle)
    await put(pool, space_of(candidate), bundle)
    with pytest.raises(PromotionRefused, match="would have 300: fill it first"):
        await require_references(pool, candidate, live)


async def test_a_half_filled_space_is_refused_and_the_row_stays(
    archive, served, pool, store, model_id, candidate, answers_cache
) -> None:
    space = space_of(candidate)
    embedder = identify_embedder(candidate, candidate.manifest.live_space)
    bundle = read_bundle(candidate, candidate.manifest.live_space)
    cache = ReferenceCache(pool)
    await cache.begin(embedder, expected=500)
    await cache.take_in(space, bundle.images[:200], bundle.embeddings[:200])
    request = PromotionRequest(
        candidate.manifest.model_id, approved_by="Dr Test", reason="update", cache=answers_cache
    )
    with pytest.raises(
        PromotionRefused,
        match=r"must not answer\. filled: a job began to fill it and has not come to its end",
    ):
        await promote(served, store, request, print)
    live = await live_model(pool)
    assert live is not None
    assert live.model_id == model_id
    # The job goes on where it was: promotion put nothing of its own into a space that is being filled.
    assert (await summary_of(pool, space)).images == 200


async def test_a_space_that_a_job_filled_further_stays_as_it_is(pool, candidate) -> None:
    space = space_of(candidate)
    bundle, more = read_bundle(candidate, candidate.manifest.live_space), strangers(candidate, 100)
    cache = ReferenceCache(pool)
    await cache.begin(identify_embedder(candidate, candidate.manifest.live_space), expected=400)
    await cache.take_in(space, bundle.images, bundle.embeddings)
    await cache.take_in(space, more.images, more.embeddings)
    await cache.complete(space)
    assert await fill_space(pool, candidate) == f"{space} holds 400 references"
    await require_verified(pool, candidate)
    assert (await summary_of(pool, space)).images_expected == 400


async def test_every_failed_check_is_named(pool, candidate) -> None:
    await fill_space(pool, candidate)
    space = space_of(candidate)
    await pool.execute(
        "UPDATE space_embedders SET embedder_digest = $2 WHERE embedding_space = $1", space, "e" * 64
    )
    bundle = read_bundle(candidate, candidate.manifest.live_space)
    await pool.execute(
        "UPDATE reference_embeddings SET embedding = $2 WHERE embedding_space = $1 AND isic_id = $3",
        space,
        2 * bundle.embeddings[0],
        bundle.images[0].isic_id,
    )
    named = rf"^{space} must not answer\..*embedder: filled by e{{12}}.*unit norms: 1 vectors are not of unit norm"
    with pytest.raises(PromotionRefused, match=named):
        await require_verified(pool, candidate)

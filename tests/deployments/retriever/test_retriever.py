"""The references that ship with the model, searched in its own space."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from data_jobs.references.load import ReferenceBundle, publish_bundled, read_bundle
from model_store.registry import ModelStore
from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.diagnosis import MALIGNANT
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import live_model


@pytest.fixture(scope="module")
def bundle(models: Path, model_id: str) -> ReferenceBundle:
    model = ModelStore(models).open(model_id)
    return read_bundle(model, model.manifest.live_space)


@pytest.fixture(scope="module")
def space(models: Path, model_id: str) -> str:
    return ModelStore(models).open(model_id).manifest.live_space.embedding_space


@pytest.fixture(scope="module")
async def published(database, models: Path, model_id: str) -> AsyncIterator[ReferenceStore]:
    await publish_bundled(database.owner, models, model_id)
    pool = await open_pool(database.app, minimum=0, maximum=2, timeout_s=20)
    yield ReferenceStore(pool)
    await pool.close()


async def test_the_shipped_references_are_there_once(
    published: ReferenceStore, pool, database, models, model_id, space, bundle
) -> None:
    assert await published.count(space) == len(bundle.images)
    assert await publish_bundled(database.owner, models, model_id) == 0
    assert await published.count(space) == len(bundle.images)
    live = await live_model(pool)
    assert live is not None
    assert (live.model_id, live.embedding_space) == (model_id, space)
    assert live.model_digest == ModelStore(models).open(model_id).digest


def test_every_shipped_reference_may_be_shown(bundle: ReferenceBundle) -> None:
    assert len({image.isic_id for image in bundle.images}) == len(bundle.images) >= 1000
    assert all(image.copyright_license and image.attribution for image in bundle.images)
    assert {image.diagnosis for image in bundle.images} > set(MALIGNANT)
    norms = np.linalg.norm(bundle.embeddings, axis=1)
    assert np.abs(norms - 1).max() < 1e-2


@pytest.mark.parametrize("licences", [(), ("one",)])
async def test_the_search_agrees_with_a_sorted_list(
    published: ReferenceStore, bundle: ReferenceBundle, space: str, licences
) -> None:
    if licences:
        licences = (bundle.images[0].copyright_license,)
    stored = bundle.embeddings.astype(np.float16).astype(np.float64)
    for seed in range(5):
        query = np.random.default_rng(seed).normal(size=512)
        query += 4 * bundle.embeddings[seed * 7] * np.sqrt(512)
        query = (query / np.linalg.norm(query)).astype(np.float32)
        cosines = stored @ query.astype(np.float64) / np.linalg.norm(stored, axis=1)
        expected, seen = [], set()
        for i in np.argsort(-cosines):
            image = bundle.images[i]
            lesion = image.lesion_id or image.isic_id
            if lesion in seen or (licences and image.copyright_license not in licences):
                continue
            seen.add(lesion)
            expected.append((image.isic_id, cosines[i]))
        found = await published.nearest(
            query, embedding_space=space, k=10, reference_filter=ReferenceFilter(licences)
        )
        similarities = [case.similarity for case in found.similar]
        assert similarities == pytest.approx([cosine for _, cosine in expected[:10]], abs=2e-3)
        allowed = {isic_id for isic_id, cosine in expected if cosine >= expected[9][1] - 2e-3}
        assert {case.isic_id for case in found.similar} <= allowed
        assert found.malignant_share == sum(case.diagnosis in MALIGNANT for case in found.similar) / 10


async def test_another_space_holds_nothing(published: ReferenceStore, bundle: ReferenceBundle) -> None:
    found = await published.nearest(bundle.embeddings[0], embedding_space="another", k=10)
    assert found.similar == ()
    assert found.malignant_share is None
    assert found.nearest_benign is None

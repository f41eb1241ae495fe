"""Which space answers: shipped references are loaded once and never by halves, a filled space is checked first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
import shutil

import numpy as np
import pytest

from data_jobs.references.catalogue import read_references
from data_jobs.references.embedder import (
    PreparedReference,
    ReferenceEmbedder,
    identify_embedder,
    prepare_reference,
)
from data_jobs.references.load import (
    CANARIES,
    Check,
    publish_bundled,
    publish_space,
    read_bundle,
    verify_space,
)
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.diagnosis import MALIGNANT
from serve_app.domain.errors import Conflict
from serve_app.records.pool import Pool
from serve_app.records.references import ReferenceCache, ReferenceStore
from serve_app.records.serving import live_model, publish
from tests.data_jobs.references.conftest import reference_image
from tests.pools import connected

IMAGES, CLINICAL = 12, (0, 5)


@pytest.fixture
async def pool(new_database) -> AsyncIterator[Pool]:
    urls = await new_database()
    async with connected(urls.owner) as pool:
        yield pool


@pytest.fixture
def folder(make_folder: Callable[..., Path]) -> Path:
    """Drawn references, among them images that the job leaves out."""
    return make_folder(IMAGES, clinical=CLINICAL)


async def fill(pool: Pool, model: StoredModel, folder: Path) -> None:
    """What the job does, without Ray."""
    spec, geometry = model.manifest.live_space, InputGeometry.from_manifest(model.manifest.input)
    entries = read_references(folder)
    prepared = [prepare_reference(folder / entry.path, entry.isic_id, geometry) for entry in entries]
    pixels = np.stack([one.pixels for one in prepared if isinstance(one, PreparedReference)])
    cache = ReferenceCache(pool)
    await cache.begin(identify_embedder(model, spec), expected=len(entries))
    vectors = ReferenceEmbedder(model, spec).embed(pixels)
    await cache.take_in(spec.embedding_space, [reference_image(entry) for entry in entries], vectors)
    await cache.complete(spec.embedding_space)


async def canaries(pool: Pool, model: StoredModel, folder: Path) -> Check:
    checks = {check.name: check for check in await verify_space(pool, model, folder=folder)}
    assert all(check.passed for name, check in checks.items() if name != "canaries"), checks
    return checks["canaries"]


async def test_canaries_are_found_unread_or_lost_and_where_none_was_read_nothing_was_checked(
    pool, models, model, folder
) -> None:
    await fill(pool, model, folder)
    # Images that the job leaves out are none.
    found = await canaries(pool, model, folder)
    assert found == Check("canaries", passed=True, found=f"{CANARIES} of {CANARIES} embedded anew, all found")

    first, second, third, *_ = read_references(folder)
    (folder / first.path).unlink()
    (folder / second.path).write_bytes(b"not an image")
    found = await canaries(pool, model, folder)
    told = (
        f"{CANARIES - 2} of {CANARIES} embedded anew (the others: unreadable, unsupported_image), all found"
    )
    assert found == Check("canaries", passed=True, found=told)

    await pool.execute("DELETE FROM reference_embeddings WHERE isic_id = $1", third.isic_id)
    await pool.execute("UPDATE space_embedders SET images_expected = images_expected - 1")
    found = await canaries(pool, model, folder)
    assert not found.passed
    assert found.found.endswith(f", {third.isic_id} lost")

    shutil.rmtree(folder / "images")
    found = await canaries(pool, model, folder)
    told = f"0 of {CANARIES} embedded anew (the others: unreadable)"
    assert found == Check("canaries", passed=False, found=told)
    with pytest.raises(Conflict, match="must not answer: canaries"):
        await publish_space(pool, models, model.manifest.model_id, folder=folder)
    assert await live_model(pool) is None


async def test_references_load_once_and_again_for_a_rebuilt_folder(new_database, models, model_id) -> None:
    urls = await new_database()
    space = ModelStore(models).open(model_id).manifest.live_space
    assert await publish_bundled(urls.owner, models, model_id) == space.count
    assert await publish_bundled(urls.owner, models, model_id) == 0
    async with connected(urls.owner) as pool:
        answering = await live_model(pool)
        assert answering is not None
        # As if an earlier build of the same model, of as many references, had been published.
        await publish(pool, replace(answering, model_digest="0" * 64))
        assert await publish_bundled(urls.owner, models, model_id) == space.count
        assert await live_model(pool) == answering
        assert await ReferenceStore(pool).count(space.embedding_space) == space.count


def test_every_shipped_reference_may_be_shown(model) -> None:
    bundle = read_bundle(model, model.manifest.live_space)
    assert len({image.isic_id for image in bundle.images}) == len(bundle.images) >= 1000
    assert all(image.copyright_license and image.attribution for image in bundle.images)
    assert {image.diagnosis for image in bundle.images} > set(MALIGNANT)
    norms = np.linalg.norm(bundle.embeddings, axis=1)
    assert np.abs(norms - 1).max() < 1e-2

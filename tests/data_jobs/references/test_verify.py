"""Canaries: images embedded anew find themselves, and where none could be embedded nothing was checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
import shutil

import numpy as np
import pytest

from data_jobs.references.catalogue import CatalogueEntry, read_references
from data_jobs.references.embedder import (
    PreparedReference,
    ReferenceEmbedder,
    identify_embedder,
    prepare_reference,
)
from data_jobs.references.load import publish_space
from data_jobs.references.verify import CANARIES, Check, verify_space
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore, StoredModel
from serve_app.domain.errors import Conflict
from serve_app.records.pool import Pool, open_pool
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceImage
from serve_app.records.serving import live_model

IMAGES, CLINICAL = 12, (0, 5)


@pytest.fixture
def model(models: Path, model_id: str) -> StoredModel:
    return ModelStore(models).open(model_id)


@pytest.fixture
async def pool(new_database) -> AsyncIterator[Pool]:
    urls = await new_database()
    opened = await open_pool(urls.owner, minimum=0, maximum=2, timeout_s=20)
    yield opened
    await opened.close()


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
    await cache.take_in(spec.embedding_space, [case_of(entry) for entry in entries], vectors)
    await cache.complete(spec.embedding_space)


def case_of(entry: CatalogueEntry) -> ReferenceImage:
    return ReferenceImage(
        entry.isic_id,
        entry.lesion_id,
        entry.diagnosis,
        entry.diagnosis_confirm_type,
        entry.age_approx,
        entry.sex,
        entry.anatom_site_general,
        entry.copyright_license,
        entry.attribution,
    )


async def canaries(pool: Pool, model: StoredModel, folder: Path) -> Check:
    checks = {check.name: check for check in await verify_space(pool, model, folder=folder)}
    assert all(check.passed for name, check in checks.items() if name != "canaries"), checks
    return checks["canaries"]


async def test_images_that_the_job_leaves_out_are_no_canaries(pool, model, folder) -> None:
    await fill(pool, model, folder)
    found = await canaries(pool, model, folder)
    assert found == Check("canaries", passed=True, found=f"{CANARIES} of {CANARIES} embedded anew, all found")


async def test_what_could_not_be_read_is_counted(pool, model, folder) -> None:
    await fill(pool, model, folder)
    first, second, *_ = read_references(folder)
    (folder / first.path).unlink()
    (folder / second.path).write_bytes(b"not an image")
    found = await canaries(pool, model, folder)
    assert found.passed
    assert found.found == (
        f"{CANARIES - 2} of {CANARIES} embedded anew (the others: unreadable, unsupported_image), all found"
    )


async def test_a_folder_without_images_checks_nothing_and_publishes_nothing(
    pool, models, model, folder
) -> None:
    await fill(pool, model, folder)
    shutil.rmtree(folder / "images")
    found = await canaries(pool, model, folder)
    assert not found.passed
    assert found.found == f"0 of {CANARIES} embedded anew (the others: unreadable)"
    with pytest.raises(Conflict, match="must not answer: canaries"):
        await publish_space(pool, models, model.manifest.model_id, folder=folder)
    assert await live_model(pool) is None


async def test_an_image_that_is_not_in_the_space_is_lost(pool, model, folder) -> None:
    await fill(pool, model, folder)
    lost = read_references(folder)[1].isic_id
    await pool.execute("DELETE FROM reference_embeddings WHERE isic_id = $1", lost)
    await pool.execute("UPDATE space_embedders SET images_expected = images_expected - 1")
    found = await canaries(pool, model, folder)
    assert not found.passed
    assert found.found == f"{CANARIES} of {CANARIES} embedded anew, {lost} lost"

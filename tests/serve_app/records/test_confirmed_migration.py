"""A database that was filled before references could be searched for by confirmation can be searched so afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
import shutil

import pytest

from serve_app.domain.assessment import ReferenceFilter
from serve_app.records.migrate import MIGRATIONS, migrate
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore

#: What is confirmed of three images, and what the first version of the schema holds of them.
CONFIRM_TYPES = ("histo", None, "")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The migrations up to the one before."""
    for path in MIGRATIONS.glob("*.sql"):
        if path.name < "0011":
            shutil.copy(path, tmp_path)
    return tmp_path


async def _fill(pool, vectors: Sequence[object]) -> None:
    await pool.execute("INSERT INTO embedding_spaces (embedding_space) VALUES ('old')")
    for number, (confirm_type, vector) in enumerate(zip(CONFIRM_TYPES, vectors, strict=True)):
        isic_id = f"ISIC_000000{number}"
        await pool.execute(
            "INSERT INTO reference_images (isic_id, diagnosis, diagnosis_confirm_type, copyright_license,"
            " attribution) VALUES ($1, 'MEL', $2, 'CC-0', 'Anonymous')",
            isic_id,
            confirm_type,
        )
        await pool.execute(
            "INSERT INTO reference_embeddings (embedding_space, isic_id, lesion_key, malignant,"
            " copyright_license, embedding) VALUES ('old', $1, $1, true, 'CC-0', $2)",
            isic_id,
            vector,
        )


async def test_what_was_there_is_found_as_confirmed_or_not(new_database, earlier: Path, unit_vectors) -> None:
    urls = await new_database(migrated=False)
    vectors = unit_vectors(3)
    await migrate(urls.owner, application_role=None, directory=earlier)
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    try:
        await _fill(pool, vectors)
        await migrate(urls.owner, application_role="derm_app")
    finally:
        await pool.close()
    pool = await open_pool(urls.app, minimum=0, maximum=1, timeout_s=20)
    try:
        store, confirmed = ReferenceStore(pool), ReferenceFilter(confirmed_only=True)
        every = await store.nearest(vectors[1], embedding_space="old", k=3)
        known = await store.nearest(vectors[1], embedding_space="old", k=3, reference_filter=confirmed)
        counted = await pool.fetch("SELECT confirmed, images FROM reference_counts ORDER BY confirmed")
    finally:
        await pool.close()
    assert len(every.similar) == 3
    assert [case.diagnosis_confirm_type for case in known.similar] == ["histo"]
    assert [tuple(row) for row in counted] == [(False, 2), (True, 1)]

"""A database that was filled before references could be searched for by diagnosis can be searched so afterwards."""

from __future__ import annotations

from pathlib import Path
import shutil

import pytest

from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.records.migrate import MIGRATIONS, migrate
from serve_app.records.pool import open_pool, queries
from serve_app.records.references import ReferenceStore

#: Of each, so many: enough for an index of both kinds.
DIAGNOSES = {Diagnosis.NV: 60, Diagnosis.DF: 3, Diagnosis.MEL: 40, Diagnosis.BCC: 20}
EXACT_BELOW = 50


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The migrations up to the one before."""
    for path in MIGRATIONS.glob("*.sql"):
        if path.name < "0013":
            shutil.copy(path, tmp_path)
    return tmp_path


async def _fill(pool, kinds: list[Diagnosis], vectors) -> None:
    await pool.execute("INSERT INTO embedding_spaces (embedding_space) VALUES ('old')")
    for number, (diagnosis, vector) in enumerate(zip(kinds, vectors, strict=True)):
        isic_id = f"ISIC_{number:07d}"
        await pool.execute(
            "INSERT INTO reference_images (isic_id, diagnosis, diagnosis_confirm_type, copyright_license,"
            " attribution) VALUES ($1, $2, 'histo', 'CC-0', 'Anonymous')",
            isic_id,
            diagnosis,
        )
        await pool.execute(
            "INSERT INTO reference_embeddings (embedding_space, isic_id, lesion_key, malignant,"
            " copyright_license, confirmed, embedding) VALUES ('old', $1, $1, $2, 'CC-0', true, $3)",
            isic_id,
            diagnosis in MALIGNANT,
            vector,
        )
    await pool.execute(
        "INSERT INTO reference_counts"
        " (embedding_space, malignant, copyright_license, anatom_site_general, confirmed, images)"
        " SELECT 'old', malignant, 'CC-0', NULL, true, count(*) FROM reference_embeddings GROUP BY malignant"
    )
    for (statement,) in await pool.fetch(queries("references")["index_statements"], "old", EXACT_BELOW):
        await pool.execute(statement)


async def _indexes(pool) -> list[str]:
    rows = await pool.fetch(
        "SELECT indexrelid::regclass::text FROM pg_index"
        " WHERE indrelid = 'reference_embeddings'::regclass AND indisvalid ORDER BY 1"
    )
    return [name for (name,) in rows]


async def test_what_was_there_is_found_by_its_diagnosis(new_database, earlier: Path, unit_vectors) -> None:
    urls = await new_database(migrated=False)
    kinds = [diagnosis for diagnosis, count in DIAGNOSES.items() for _ in range(count)]
    vectors = unit_vectors(len(kinds))
    await migrate(urls.owner, application_role=None, directory=earlier)
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    try:
        await _fill(pool, kinds, vectors)
        indexes = await _indexes(pool)
        assert len(indexes) == 4
        before = await pool.fetch(
            "SELECT isic_id, embedding::text FROM reference_embeddings ORDER BY isic_id"
        )
        await migrate(urls.owner, application_role="derm_app")
        assert await _indexes(pool) == indexes
        assert before == await pool.fetch(
            "SELECT isic_id, embedding::text FROM reference_embeddings ORDER BY isic_id"
        )
    finally:
        await pool.close()
    pool = await open_pool(urls.app, minimum=0, maximum=1, timeout_s=20)
    try:
        for exact_below in (EXACT_BELOW, 10**9):
            store = ReferenceStore(pool, exact_below=exact_below)
            every = await store.nearest(vectors[1], embedding_space="old", k=50)
            assert len(every.similar) == 50
            for diagnosis, count in DIAGNOSES.items():
                only = ReferenceFilter(diagnoses=(diagnosis,))
                found = await store.nearest(vectors[1], embedding_space="old", k=50, reference_filter=only)
                assert len(found.similar) == min(50, count)
                assert {case.diagnosis for case in found.similar} == {diagnosis}
        counted = await pool.fetch("SELECT diagnosis, malignant, images FROM reference_counts")
    finally:
        await pool.close()
    assert {tuple(row) for row in counted} == {
        (diagnosis, diagnosis in MALIGNANT, count) for diagnosis, count in DIAGNOSES.items()
    }

"""A database that was filled before a migration of the references can be used after it."""

from __future__ import annotations

from pathlib import Path
import shutil

import pytest

from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.errors import Conflict
from serve_app.records.health import find_violations
from serve_app.records.migrate import MIGRATIONS, migrate
from serve_app.records.pool import open_pool, queries
from serve_app.records.references import ReferenceImage, ReferenceStore

#: Of each, so many: enough for an index of both kinds.
DIAGNOSES = {Diagnosis.NV: 60, Diagnosis.DF: 3, Diagnosis.MEL: 40, Diagnosis.BCC: 20}
EXACT_BELOW = 50


@pytest.fixture
async def earlier(new_database, tmp_path: Path):
    """Make a database of the migrations before a version, and fill it; the owner's pool, and how to migrate on."""
    urls = await new_database(migrated=False)

    async def fill(before: str, references):
        for path in MIGRATIONS.glob("*.sql"):
            if path.name < before:
                shutil.copy(path, tmp_path)
        await migrate(urls.owner, application_role=None, directory=tmp_path)
        # In SQL: the store writes what the latest schema has.
        if before > "0011":
            await pool.execute("ALTER TABLE reference_embeddings ALTER COLUMN confirmed SET DEFAULT true")
        await pool.execute("INSERT INTO embedding_spaces (embedding_space) VALUES ('old')")
        for number, (diagnosis, confirm_type, licence, vector) in enumerate(references):
            isic_id = f"ISIC_{number:07d}"
            await pool.execute(
                "INSERT INTO reference_images (isic_id, diagnosis, diagnosis_confirm_type, copyright_license,"
                " attribution) VALUES ($1, $2, $3, $4, 'Anonymous')",
                *(isic_id, diagnosis, confirm_type, licence),
            )
            await pool.execute(
                "INSERT INTO reference_embeddings (embedding_space, isic_id, lesion_key, malignant,"
                " copyright_license, embedding) VALUES ('old', $1, $1, $2, $3, $4)",
                *(isic_id, diagnosis in MALIGNANT, licence, vector),
            )
        return pool

    async def finish() -> None:
        await migrate(urls.owner, application_role="derm_app")

    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    yield fill, finish
    await pool.close()


async def test_what_was_there_is_confirmed_or_not_and_a_licence_of_nobodys_archive_is_named(
    earlier, unit_vectors
) -> None:
    """And none comes in any more."""
    fill, finish = earlier
    vectors = unit_vectors(3)
    kinds = zip(("histo", None, ""), ("CC-0", "CC-0", "all rights reserved"), vectors, strict=True)
    pool = await fill("0011", [(Diagnosis.MEL, *kind) for kind in kinds])
    await finish()
    store, confirmed = ReferenceStore(pool), ReferenceFilter(confirmed_only=True)
    every = await store.nearest(vectors[1], embedding_space="old", k=3)
    known = await store.nearest(vectors[1], embedding_space="old", k=3, reference_filter=confirmed)
    counted = await pool.fetch("SELECT confirmed, images FROM reference_counts ORDER BY confirmed, images")
    assert len(every.similar) == 3
    assert [case.diagnosis_confirm_type for case in known.similar] == ["histo"]
    assert [tuple(row) for row in counted] == [(False, 1), (False, 1), (True, 1)]
    (found,) = await find_violations(pool)
    assert (found.name, found.count) == ("references_licensed", 1)

    async def load(number: int, licence: str) -> None:
        values = (None, Diagnosis.NV, "histo", None, None, None, licence, "Anonymous")
        image = ReferenceImage(f"ISIC_{number:07d}", *values)
        await store.load([image], vectors[:1], embedding_space="old")

    with pytest.raises(Conflict, match="reference_images_licensed"):
        await load(3, "CC-BY-SA")
    for number, licence in enumerate(("CC-0", "CC-BY", "CC-BY-NC")):
        await load(number, licence)
    assert await find_violations(pool) == []


async def test_what_was_there_is_found_by_its_diagnosis(earlier, unit_vectors) -> None:
    """By the indexes that were there, and without."""
    fill, finish = earlier
    kinds = [diagnosis for diagnosis, count in DIAGNOSES.items() for _ in range(count)]
    vectors = unit_vectors(len(kinds))
    rows = [(kind, "histo", "CC-0", vector) for kind, vector in zip(kinds, vectors, strict=True)]
    pool = await fill("0013", rows)
    await pool.execute(
        "INSERT INTO reference_counts"
        " (embedding_space, malignant, copyright_license, anatom_site_general, confirmed, images)"
        " SELECT 'old', malignant, 'CC-0', NULL, true, count(*) FROM reference_embeddings GROUP BY malignant"
    )
    for (statement,) in await pool.fetch(queries("references")["index_statements"], "old", EXACT_BELOW):
        await pool.execute(statement)
    indexes = (
        "SELECT indexrelid::regclass::text FROM pg_index"
        " WHERE indrelid = 'reference_embeddings'::regclass AND indisvalid ORDER BY 1"
    )
    kept = "SELECT isic_id, embedding::text FROM reference_embeddings ORDER BY isic_id"
    before = await pool.fetch(indexes), await pool.fetch(kept)
    assert len(before[0]) == 4
    await finish()
    assert before == (await pool.fetch(indexes), await pool.fetch(kept))
    for exact_below in (EXACT_BELOW, 10**9):
        store = ReferenceStore(pool, exact_below=exact_below)
        assert len((await store.nearest(vectors[1], embedding_space="old", k=50)).similar) == 50
        for diagnosis, count in DIAGNOSES.items():
            only = ReferenceFilter(diagnoses=(diagnosis,))
            found = await store.nearest(vectors[1], embedding_space="old", k=50, reference_filter=only)
            assert [case.diagnosis for case in found.similar] == [diagnosis] * min(50, count)
    counted = await pool.fetch("SELECT diagnosis, malignant, images FROM reference_counts")
    assert {tuple(row) for row in counted} == {
        (diagnosis, diagnosis in MALIGNANT, count) for diagnosis, count in DIAGNOSES.items()
    }

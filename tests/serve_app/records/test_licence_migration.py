"""Only a licence of the archive comes into the references; one that came before is named, and stops nobody."""

from __future__ import annotations

from pathlib import Path
import shutil

import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict
from serve_app.records.health import find_violations
from serve_app.records.migrate import MIGRATIONS, migrate
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceImage, ReferenceStore


def reference(number: int, licence: str) -> ReferenceImage:
    return ReferenceImage(
        f"ISIC_000000{number}", None, Diagnosis.NV, "histo", None, None, None, licence, "Anonymous"
    )


async def test_what_is_there_is_named_and_nothing_more_comes_in(
    new_database, tmp_path: Path, unit_vectors
) -> None:
    for path in MIGRATIONS.glob("*.sql"):
        if path.name < "0012":
            shutil.copy(path, tmp_path)
    urls = await new_database(migrated=False)
    await migrate(urls.owner, application_role=None, directory=tmp_path)
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=20)
    try:
        store = ReferenceStore(pool)
        # In SQL: the store writes what the latest schema has.
        await pool.execute("INSERT INTO embedding_spaces (embedding_space) VALUES ('s')")
        await pool.execute(
            "INSERT INTO reference_images (isic_id, diagnosis, diagnosis_confirm_type, copyright_license,"
            " attribution) VALUES ('ISIC_0000001', 'NV', 'histo', 'all rights reserved', 'Anonymous')"
        )
        await pool.execute(
            "INSERT INTO reference_embeddings (embedding_space, isic_id, lesion_key, malignant,"
            " copyright_license, confirmed, embedding)"
            " VALUES ('s', 'ISIC_0000001', 'ISIC_0000001', false, 'all rights reserved', true, $1)",
            unit_vectors(1)[0],
        )
        await migrate(urls.owner, application_role="derm_app")
        (found,) = await find_violations(pool)
        assert (found.name, found.count) == ("references_licensed", 1)
        with pytest.raises(Conflict, match="reference_images_licensed"):
            await store.load([reference(2, "CC-BY-SA")], unit_vectors(1), embedding_space="s")
        for number, licence in enumerate(("CC-0", "CC-BY", "CC-BY-NC"), 1):
            await store.load([reference(number, licence)], unit_vectors(1), embedding_space="s")
        assert await find_violations(pool) == []
    finally:
        await pool.close()

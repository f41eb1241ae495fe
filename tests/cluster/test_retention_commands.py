"""`derm-cds hold` and `derm-cds retention` against a real database and key store."""

from __future__ import annotations

import asyncio
from contextlib import closing
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.records.pool import open_pool
from serve_app.settings import NodeFiles

_IMAGE = """
WITH lesion AS (
    INSERT INTO lesions VALUES ($1, 'p-1', '2020-01-01'::timestamptz) RETURNING lesion_id
), image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, sealed)
    VALUES ($2, $1, 'p-1', '2020-01-01'::timestamptz, 'image/png', 300, 300, $3, $4) RETURNING image_id
)
INSERT INTO assessments (assessment_id, image_id, created_at, outcome, failure, completed_at, context, top_k, licences,
    actor, request_id)
VALUES ($5, $2, now(), 'failed', 'test', now(), '{}', 10, '{}', 'dr', 'r')
"""


async def _run(query: str, *values: object) -> list[Any]:
    pool = await open_pool(os.environ["DERM_OWNER_DATABASE_URL"], minimum=0, maximum=1)
    try:
        return await pool.fetch(query, *values)
    finally:
        await pool.close()


@pytest.fixture
async def home(new_database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    urls = await new_database()
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)
    monkeypatch.setenv("DERM_TOKEN_SECRET", "a secret of the tests, long enough for HS256")
    return tmp_path


@pytest.fixture
def image(home: Path) -> UUID:
    """One sealed image of patient p-1, of 2020; its data key's id."""
    files, image_id = NodeFiles(home), uuid4()
    with closing(KeyStore(files.keystore, FileKeyring.make(files.keyring))) as keys:
        key = keys.create()
        sealed = seal(b"image", data_key=key, binding=ImageBinding(image_id, "p-1", "image/png"))
    asyncio.run(_run(_IMAGE, uuid4(), image_id, key.id, sealed, uuid4()))
    return image_id


def test_a_closed_record_is_erased_when_its_hold_is_released(derm_cds, home, image) -> None:
    assert derm_cds("retention", "close", "p-1", "--at", "2021-01-01T00:00:00Z", home=home).code == 0
    held = derm_cds("hold", "set", "--image", str(image), "--reason", "case 1", home=home)
    assert held.code == 0, held.err
    hold = held.out.split()[0]
    assert f"{hold} image {image}: case 1" in derm_cds("hold", "list", home=home).out
    said = derm_cds("retention", "run", "--days", "365", "--dry-run", home=home)
    assert (
        said.out == "1 closed records; 1 images are more than 365 days past, 1 of them under a legal hold\n"
    )
    assert "0 images erased" in derm_cds("retention", "run", "--days", "365", "--yes", home=home).out
    assert derm_cds("hold", "release", hold, home=home).code == 0
    again = derm_cds("hold", "release", hold, home=home)
    assert (again.code, "is in force" in again.err) == (1, True)
    assert derm_cds("hold", "list", home=home).out == ""
    assert "released" in derm_cds("hold", "list", "--all", home=home).out
    run = derm_cds("retention", "run", "--days", "365", "--yes", home=home)
    assert "1 images erased" in run.out, run.err
    (row,) = asyncio.run(
        _run(
            "SELECT sealed, data_key_id, reason FROM lesion_images JOIN erasures USING (image_id, data_key_id)"
            " JOIN erasure_receipts USING (receipt_id)"
        )
    )
    assert (row["sealed"], row["reason"]) == (None, "retention")
    files = b"".join(file.read_bytes() for file in (home / "keys").glob("keystore.sqlite*"))
    assert b"retention" in files  # what it remembers of the destroyed key
    events = asyncio.run(_run("SELECT action FROM audit_events ORDER BY event_id"))
    assert [event["action"] for event in events] == [
        *("record_close", "hold_set", "hold_release", "erase", "erased")
    ]


def test_nothing_expires_without_a_retention_or_a_closed_record(derm_cds, home, image) -> None:
    unset = derm_cds("retention", "run", "--yes", home=home)
    assert (unset.code, "Nothing expires" in unset.err) == (1, True)
    assert "0 images erased" in derm_cds("retention", "run", "--days", "0", "--yes", home=home).out
    missing = derm_cds("hold", "set", "--lesion", str(uuid4()), "--reason", "case", home=home)
    assert (missing.code, "nothing by that id" in missing.err) == (1, True)

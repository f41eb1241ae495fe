"""`derm-cds keys` with the keyring of the home; Vault's and KMS's own answers are tests/serve_app/keys'."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
import sqlite3
from uuid import UUID

import pytest

from serve_app.domain.errors import DataKeyMissing
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.settings import NodeFiles

BINDING = ImageBinding(UUID(int=1), "patient-1", "image/jpeg")


@pytest.fixture
def files(own_home: Path) -> NodeFiles:
    """With what the first start makes, and no command does."""
    files = NodeFiles(own_home)
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    return files


def test_a_key_is_rotated_rewrapped_and_retired_on_record(derm_cds, files, sql) -> None:
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        sealed = seal(b"image", data_key=keys.create(), binding=BINDING)
    status = derm_cds("keys", "status", home=files.home).out
    assert "version 1 (current): wraps 1 data keys; 1 of at most" in status
    rotated = derm_cds("keys", "rotate", home=files.home)
    assert (rotated.code, rotated.out.startswith("version 2 wraps from now on")) == (0, True)
    rewrapped = derm_cds("keys", "rewrap", home=files.home).out
    assert "1 data keys rewrapped; all are under version 2" in rewrapped
    current = derm_cds("keys", "retire", "2", home=files.home)
    assert (current.code, "`derm-cds keys rewrap` first" in current.err) == (1, True)
    assert derm_cds("keys", "retire", "1", home=files.home).code == 0
    unknown = derm_cds("keys", "retire", "1", home=files.home)
    assert (unknown.code, unknown.err.count("\n")) == (1, 1)
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        assert keys.open_image(sealed, BINDING) == b"image"
    assert "version 1 (retired): wraps 0" in derm_cds("keys", "status", home=files.home).out
    events = sql("SELECT action, outcome FROM audit_events WHERE action LIKE 'key_%' ORDER BY event_id")
    done = [(row["action"].removeprefix("key_"), row["outcome"]) for row in events]
    assert done == [
        ("rotate", "success"),
        ("rewrap", "success"),
        ("retire", "success"),
        ("retire", "success"),
        ("retire", "failed"),
    ]


def test_another_keyrings_store_is_not_rotated(derm_cds, files, sql) -> None:
    files.keyring.unlink()
    FileKeyring.make(files.keyring)
    before = files.keyring.read_bytes()
    said = derm_cds("keys", "rotate", home=files.home)
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert files.keyring.read_bytes() == before
    assert sql("SELECT * FROM audit_events") == []


def test_keys_without_an_image_are_counted_and_swept_when_told_to(derm_cds, files) -> None:
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        failed, lost, young = (keys.create().id for _ in range(3))
        keys.stop_awaiting([lost])
    with closing(sqlite3.connect(files.keystore)) as store, store:
        store.execute(
            "UPDATE data_keys SET created_at = datetime('now', '-2 hours') WHERE data_key_id <> ?",
            (young.bytes,),
        )
    said = derm_cds("keys", "sweep", home=files.home)
    assert said.code == 0, said.err
    assert "1 data keys of uploads that failed" in said.out
    assert "1 data keys of images that this database has no more" in said.out
    assert "put the newer one back" in said.out
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        assert keys.load(failed).id == failed
        assert derm_cds("keys", "sweep", "--yes", home=files.home).out.endswith("2 data keys are destroyed\n")
        assert keys.load(young).id == young
        for key in (failed, lost):
            with pytest.raises(DataKeyMissing):
                keys.load(key)
    assert derm_cds("keys", "sweep", "--yes", home=files.home).out.endswith("0 data keys are destroyed\n")

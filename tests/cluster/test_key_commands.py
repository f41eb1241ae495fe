"""`derm-cds keys` with the key-encryption key in Vault and in KMS, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
import sqlite3
from uuid import UUID

import pytest

from serve_app.domain.errors import DataKeyMissing
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider, retries
from serve_app.settings import KeySettings, NodeFiles
from tests.serve_app.keys.key_services import KeyService, Kms, Vault

BINDING = ImageBinding(UUID(int=1), "patient-1", "image/jpeg")


@pytest.fixture
def home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(retries, "_FIRST_WAIT_S", 0.01)
    return own_home


@pytest.fixture
def transit(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    vault = Vault()
    vault.make_key("derm")
    service = KeyService(vault)
    monkeypatch.setenv("DERM_KEY_PROVIDER", f"vault+http://127.0.0.1:{service.port}/transit/derm")
    monkeypatch.setenv("VAULT_TOKEN", vault.token)
    yield service
    service.down()


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[KeyService]:
    aws = Kms()
    aws.make_key("1234abcd", alias="alias/derm")
    service = KeyService(aws)
    for name, value in {
        "DERM_KEY_PROVIDER": "kms:alias/derm",
        "AWS_ENDPOINT_URL_KMS": f"http://127.0.0.1:{service.port}",
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "NO_PROXY": "*",
    }.items():
        monkeypatch.setenv(name, value)
    yield service
    service.down()


def test_a_key_in_vault_is_rotated_rewrapped_and_retired(derm_cds, home: Path, transit: KeyService) -> None:
    store = NodeFiles(home).keystore
    with closing(KeyStore(store, open_key_provider(KeySettings(home=home)))) as keys:
        sealed = seal(b"image", data_key=keys.create(), binding=BINDING)
    status = derm_cds("keys", "status", home=home)
    assert status.out.startswith("Vault transit key transit/derm at http://127.0.0.1")
    assert "version 1 (current): wraps 1 data keys" in status.out
    assert derm_cds("keys", "rotate", home=home).out.startswith("version 2 wraps from now on")
    assert "1 data keys rewrapped; all are under version 2" in derm_cds("keys", "rewrap", home=home).out
    retired = derm_cds("keys", "retire", "1", home=home)
    assert retired.code == 0, retired.err
    with closing(KeyStore(store, open_key_provider(KeySettings(home=home)))) as keys:
        assert keys.open_image(sealed, BINDING) == b"image"
    assert not NodeFiles(home).keyring.exists()
    transit.down()
    said = derm_cds("keys", "rotate", home=home)
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert said.err.startswith("derm-cds: Vault does not answer")


def test_another_providers_store_is_not_rotated(derm_cds, home: Path, transit: KeyService) -> None:
    files = NodeFiles(home)
    with closing(KeyStore(files.keystore, FileKeyring.make(files.keyring))) as keys:
        keys.create()
    said = derm_cds("keys", "rotate", home=home)
    assert said.code == 1
    assert "DERM_KEY_PROVIDER" in said.err
    assert list(transit.service.keys["derm"]["versions"]) == [1]


def test_kms_says_what_to_do(derm_cds, home: Path, kms: KeyService) -> None:
    KeyStore(NodeFiles(home).keystore, open_key_provider(KeySettings(home=home))).close()
    assert derm_cds("keys", "status", home=home).out.startswith("AWS KMS key alias/derm\nversion 1 (current)")
    rotated = derm_cds("keys", "rotate", home=home)
    assert rotated.code == 1
    assert "aws kms rotate-key-on-demand --key-id alias/derm" in rotated.err
    assert "0 data keys rewrapped" in derm_cds("keys", "rewrap", home=home).out


def test_keys_without_an_image_are_counted_and_swept_when_told_to(derm_cds, home: Path) -> None:
    files = NodeFiles(home)
    with closing(KeyStore(files.keystore, FileKeyring.make(files.keyring))) as keys:
        failed, lost, young = (keys.create().id for _ in range(3))
        keys.stop_awaiting([lost])
    with closing(sqlite3.connect(files.keystore)) as store, store:
        store.execute(
            "UPDATE data_keys SET created_at = datetime('now', '-2 hours') WHERE data_key_id <> ?",
            (young.bytes,),
        )
    said = derm_cds("keys", "sweep", home=home)
    assert said.code == 0, said.err
    assert "1 data keys of uploads that failed" in said.out
    assert "1 data keys of images that this database has no more" in said.out
    assert "put the newer one back" in said.out
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        assert keys.load(failed).id == failed
        assert derm_cds("keys", "sweep", "--yes", home=home).out.endswith("2 data keys are destroyed\n")
        assert keys.load(young).id == young
        for key in (failed, lost):
            with pytest.raises(DataKeyMissing):
                keys.load(key)
    assert derm_cds("keys", "sweep", "--yes", home=home).out.endswith("0 data keys are destroyed\n")

"""A key store wraps under its own keys only, and knows them from the first start on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from serve_app.domain.errors import IntegrityError, KeyProviderUnavailable
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import DestroyedKey, KeyStore, look_into
from tests.serve_app.keys.key_files import count_keys, put_in_place, sqlite


@pytest.fixture
def foreign(tmp_path: Path) -> FileKeyring:
    """Another node's keyring, rotated as often as a test needs."""
    return FileKeyring.make(tmp_path / "other" / "keyring.json")


def test_the_first_start_settles_whose_store_it_is(store: KeyStore, keys: Path, foreign: FileKeyring) -> None:
    assert count_keys(keys / "keystore.sqlite") == 0
    with pytest.raises(IntegrityError, match="did not wrap what is in this key store"):
        KeyStore(keys / "keystore.sqlite", foreign)


def _rotated(foreign: FileKeyring) -> None:
    foreign.rotate()


def _rotated_and_retired(foreign: FileKeyring) -> None:
    foreign.rotate()
    foreign.retire(1)


@pytest.mark.parametrize(
    ("change", "used"), [(lambda _: None, True), (_rotated, False), (_rotated_and_retired, True)]
)
def test_a_foreign_keyring_wraps_nothing(
    store: KeyStore,
    keys: Path,
    tmp_path: Path,
    foreign: FileKeyring,
    change: Callable[[FileKeyring], None],
    *,
    used: bool,
) -> None:
    made = [store.create() for _ in range(used)]
    right = (keys / "keyring.json").read_bytes()
    change(foreign)
    put_in_place(keys / "keyring.json", (tmp_path / "other" / "keyring.json").read_bytes())
    for _ in range(2):
        with pytest.raises(KeyProviderUnavailable, match="nothing was stored") as raised:
            store.create()
        assert raised.value.status == 503
    with pytest.raises(KeyProviderUnavailable):
        store.rewrap()
    assert count_keys(keys / "keystore.sqlite") == len(made)
    put_in_place(keys / "keyring.json", right)
    made.append(store.create())
    with closing(KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json"))) as again:
        assert [again.load(key.id).id for key in made] == [key.id for key in made]


def test_a_keyring_from_before_a_rotation_wraps_nothing(
    store: KeyStore, keyring: FileKeyring, keys: Path
) -> None:
    before = (keys / "keyring.json").read_bytes()
    keyring.rotate()
    store.checks.verify()
    after = (keys / "keyring.json").read_bytes()
    put_in_place(keys / "keyring.json", before)
    with pytest.raises(KeyProviderUnavailable, match="no key of version 2"):
        store.create()
    with pytest.raises(IntegrityError, match="no key of version 2"):
        KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json"))
    put_in_place(keys / "keyring.json", after)
    assert store.load(store.create().id)


def test_a_store_from_before_there_were_checks_is_known_by_its_newest_key(
    store: KeyStore, keys: Path, foreign: FileKeyring
) -> None:
    store.create()
    sqlite(keys / "keystore.sqlite", "DROP TABLE key_checks")
    with pytest.raises(IntegrityError, match="did not wrap what is in this key store"):
        KeyStore(keys / "keystore.sqlite", foreign)
    KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json")).close()
    assert sqlite(keys / "keystore.sqlite", "SELECT key_version FROM key_checks") == [(1,)]


def test_a_store_is_known_by_its_id_and_its_keys_without_opening_it(store: KeyStore, keys: Path) -> None:
    path = keys / "keystore.sqlite"
    assert look_into(keys / "elsewhere.sqlite", [uuid4()]) is None
    assert not (keys / "elsewhere.sqlite").exists()
    kept, gone = store.create().id, store.create().id
    store.destroy(DestroyedKey(data_key_id=gone, receipt_id=uuid4(), reason="retention", actor="ops"))
    assert look_into(path, []) == look_into(path, [uuid4()]) == (store.store_id, False)
    assert look_into(path, [uuid4(), kept]) == look_into(path, [gone]) == (store.store_id, True)

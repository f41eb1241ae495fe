"""A new key-encryption key is everyone's at once; a key store wraps under its own keys only, known from the first start on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from uuid import UUID, uuid4

import pytest

from serve_app.domain import errors
from serve_app.domain.errors import Conflict, IntegrityError, KeyProviderUnavailable, NotFound
from serve_app.keys.envelope import seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import DestroyedKey, KeyStore, look_into
from tests.serve_app.keys.key_files import BINDING, count_keys, put_in_place, sqlite


@pytest.fixture
def elsewhere(keys: Path, store: KeyStore) -> Iterator[KeyStore]:
    """The same store as another process has it open, with a keyring of its own."""
    with closing(KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json"))) as other:
        yield other


def sealed_images(store: KeyStore, count: int) -> list[bytes]:
    return [seal(b"image %d" % number, data_key=store.create(), binding=BINDING) for number in range(count)]


def versions(store: KeyStore) -> dict[int, int]:
    return {count.key_version: count.data_keys for count in store.count_versions()}


def test_rewrapping_is_resumable_and_leaves_every_image_readable(store, keyring) -> None:
    images = sealed_images(store, 25)
    keyring.rotate()
    assert store.rewrap(10) == 10
    assert versions(store) == {1: 15, 2: 10}
    while store.rewrap(10):
        pass
    assert versions(store) == {1: 0, 2: 25}
    assert store.rewrap() == 0
    assert [store.open_image(sealed, BINDING) for sealed in images] == [b"image %d" % n for n in range(25)]
    counts = {count.key_version: count.wraps for count in store.count_versions()}
    assert counts == {1: 25, 2: 25}


def test_no_read_fails_while_keys_rotate_and_rewrap(store, keyring, elsewhere) -> None:
    images = sealed_images(store, 40)
    over = Event()

    def read(start: int) -> int:
        done = 0
        while not over.is_set() or done < 50:
            number = (start + 7 * done) % len(images)
            assert elsewhere.open_image(images[number], BINDING) == b"image %d" % number
            done += 1
        return done

    with ThreadPoolExecutor(5) as readers:
        reading = [readers.submit(read, start) for start in range(5)]
        try:
            for _ in range(2):
                keyring.rotate()
                while store.rewrap(8):
                    pass
        finally:
            over.set()
        assert all(task.result() >= 50 for task in reading)
    assert versions(store)[3] == 40


def test_a_key_shredded_while_others_are_rewrapped_stays_gone(store, keyring, monkeypatch) -> None:
    key = store.create()
    sealed = seal(b"image", data_key=key, binding=BINDING)
    keyring.rotate()
    wrap = store.checks.wrap

    def shred_then_wrap(data_key: bytes, data_key_id: UUID):
        monkeypatch.setattr(store.checks, "wrap", wrap)
        store.shred(data_key_id)
        return wrap(data_key, data_key_id)

    monkeypatch.setattr(store.checks, "wrap", shred_then_wrap)
    store.rewrap()
    with pytest.raises(errors.DataKeyMissing):
        store.open_image(sealed, BINDING)


def test_a_retired_key_opens_nothing_and_the_current_one_cannot_be_retired(store, keyring, keys) -> None:
    (sealed,) = sealed_images(store, 1)
    backup = (keys / "keyring.json").read_bytes()
    keyring.rotate()
    store.rewrap()
    with pytest.raises(Conflict, match="rotate and rewrap first"):
        keyring.retire(2)
    with pytest.raises(NotFound, match="version 7"):
        keyring.retire(7)
    keyring.retire(1)
    assert keyring.versions == (2,)
    assert store.open_image(sealed, BINDING) == b"image 0"
    assert backup != (keys / "keyring.json").read_bytes()
    assert FileKeyring(keys / "keyring.json").versions == (2,)


def test_rewrapping_counts_towards_the_bound(store, keyring, keys) -> None:
    sealed_images(store, 3)
    keyring.rotate()
    sqlite(keys / "keystore.sqlite", "INSERT INTO wrap_counts VALUES (2, 2147483647)")
    with pytest.raises(errors.RecordsUnavailable, match="rotate it"):
        store.rewrap()
    # All or nothing: the three are under the old key, none half way.
    assert versions(store)[1] == 3


def test_a_process_that_slept_through_a_whole_rotation_goes_on(store, keyring, elsewhere) -> None:
    """It knows the first version alone, and finds a keyring without it: by the store's word the right one."""
    (sealed,) = sealed_images(elsewhere, 1)
    keyring.rotate()
    store.rewrap()
    keyring.retire(1)
    sealed_images(elsewhere, 1)
    assert versions(store) == {1: 0, 2: 2}
    assert elsewhere.open_image(sealed, BINDING) == b"image 0"


@pytest.fixture
def foreign(tmp_path: Path) -> FileKeyring:
    """Another node's keyring, rotated as often as a test needs."""
    return FileKeyring.make(tmp_path / "other" / "keyring.json")


@pytest.mark.parametrize(("rotated", "used"), [(0, True), (1, False), (2, True)])
def test_a_foreign_keyring_wraps_nothing(store, keys, tmp_path, foreign, rotated: int, *, used: bool) -> None:
    made = [store.create() for _ in range(used)]
    right = (keys / "keyring.json").read_bytes()
    if rotated:
        foreign.rotate()
    if rotated > 1:  # and so without any version that is known here
        foreign.retire(1)
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


def test_a_keyring_from_before_a_rotation_wraps_nothing(store, keyring, keys) -> None:
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


def test_the_first_start_settles_whose_store_it_is(store, keys, foreign) -> None:
    """Stores from before there were checks are known by it."""
    assert count_keys(keys / "keystore.sqlite") == 0
    for _ in range(2):
        with pytest.raises(IntegrityError, match="did not wrap what is in this key store"):
            KeyStore(keys / "keystore.sqlite", foreign)
        store.create()
        sqlite(keys / "keystore.sqlite", "DROP TABLE IF EXISTS key_checks")
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

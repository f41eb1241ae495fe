"""The keys of erased images: out of every file, and remembered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
import random
from uuid import UUID, uuid4

import pytest

from serve_app.domain.errors import DataKeyMissing, Erased
from serve_app.keys.envelope import seal
from serve_app.keys.keystore import DestroyedKey, KeyStore
from tests.serve_app.keys.key_files import BINDING, bytes_on_disk, sqlite


def destroyed(data_key_id: UUID) -> DestroyedKey:
    return DestroyedKey(data_key_id=data_key_id, receipt_id=uuid4(), reason="retention", actor="ops")


def test_a_destroyed_key_says_so_and_stays_destroyed(store: KeyStore) -> None:
    key = store.create()
    sealed = seal(b"image", data_key=key, binding=BINDING)
    gone = destroyed(key.id)
    store.destroy(gone)
    store.destroy(destroyed(key.id))  # a second try is the first one's
    with pytest.raises(Erased):
        store.open_image(sealed, BINDING)
    assert [found for _, found in store.list_destroyed()] == [gone]


def test_only_a_key_that_was_here_is_destroyed(store: KeyStore) -> None:
    """Another node's, or one that a restore has lost: nothing is remembered that nobody has seen gone."""
    elsewhere, swept = destroyed(uuid4()), destroyed(store.create().id)
    store.shred(swept.data_key_id)
    for key in (elsewhere, swept):
        with pytest.raises(DataKeyMissing):
            store.destroy(key)
        with pytest.raises(DataKeyMissing):
            store.load(key.data_key_id)
    assert store.list_destroyed() == []
    store.destroy(replace(elsewhere, proven=True))  # a receipt says so
    with pytest.raises(Erased):
        store.load(elsewhere.data_key_id)
    store.destroy(elsewhere)  # and so it is known


def test_of_many_destroyed_keys_no_file_holds_any(store: KeyStore, keys: Path) -> None:
    """Pages merge as keys go: neither the live page nor what moved may keep a copy."""
    made = [store.create().id for _ in range(60)]
    rows = sqlite(keys / "keystore.sqlite", "SELECT data_key_id, wrapped FROM data_keys")
    on_disk = {UUID(bytes=key): wrapped for key, wrapped in rows}
    gone = random.Random(7).sample(made, 48)  # noqa: S311 - no secret
    for data_key_id in gone:
        store.destroy(destroyed(data_key_id))
    found = bytes_on_disk(keys)
    assert [key for key in gone if on_disk[key] in found or on_disk[key][12:44] in found] == []
    assert all(on_disk[key] in found for key in set(made) - set(gone))


def test_destroyed_keys_are_listed_page_by_page(store: KeyStore) -> None:
    ids = [store.create().id for _ in range(5)]
    for data_key_id in ids:
        store.destroy(destroyed(data_key_id))
    seen, after = [], 0
    while page := store.list_destroyed(after=after, limit=2):
        after = page[-1][0]
        seen += [key.data_key_id for _, key in page]
    assert seen == ids


def test_keys_are_listed_by_age_and_awaited_until_their_image_was_seen(store: KeyStore) -> None:
    ids = [store.create().id for _ in range(3)]
    assert store.list_made_before(3600) == []
    (first,) = store.list_made_before(0, limit=1)
    assert [key for _, key, _ in store.list_made_before(0, after=first[0])] == ids[1:]
    assert store.list_awaited() == sorted(ids)
    assert store.list_awaited(after=min(ids), limit=1) == [sorted(ids)[1]]
    store.stop_awaiting(ids[:2])
    store.stop_awaiting(ids[:2])
    assert store.list_awaited() == ids[2:]
    assert [awaited for _, _, awaited in store.list_made_before(0)] == [False, False, True]
    store.shred(ids[2])
    assert store.list_awaited() == []

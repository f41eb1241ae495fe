"""Keys that are there when they should be, and gone when they should be."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
import random
import sqlite3
import subprocess
from uuid import UUID, uuid4

import pytest

from serve_app.domain.errors import DataKeyMissing, Erased, IntegrityError, RecordsUnavailable
from serve_app.keys import keystore
from serve_app.keys.envelope import open_sealed, seal
from serve_app.keys.keyring import FileKeyring, WrappedKey
from serve_app.keys.keystore import DestroyedKey, KeyStore
from tests.serve_app.keys.key_files import BINDING, bytes_on_disk, sqlite

Started = Callable[[str], subprocess.Popen[str]]


def test_every_file_is_private_or_refused(store: KeyStore, keys: Path, keyring: FileKeyring) -> None:
    store.create()
    modes = {file.name: file.stat().st_mode & 0o777 for file in keys.iterdir()}
    names = ("keyring.json", "keystore.sqlite", "keystore.sqlite-shm", "keystore.sqlite-wal")
    assert modes == dict.fromkeys(names, 0o600)
    (keys / "keystore.sqlite").chmod(0o640)
    with pytest.raises(IntegrityError, match="chmod go-rwx"):
        KeyStore(keys / "keystore.sqlite", keyring)


def test_a_commit_is_on_disk_before_it_returns(store: KeyStore) -> None:
    assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._connection.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_a_shredded_key_is_gone_from_every_file(store: KeyStore, keys: Path, keyring: FileKeyring) -> None:
    kept, key = store.create(), store.create()
    sealed = seal(b"image", data_key=kept, binding=BINDING)
    wanted = "SELECT wrapped, key_version FROM data_keys WHERE data_key_id = ?"
    (row,) = sqlite(keys / "keystore.sqlite", wanted, key.id.bytes)
    assert row[0] in bytes_on_disk(keys)
    assert keyring.unwrap(WrappedKey(*row), key.id) not in bytes_on_disk(keys)
    store.shred(key.id)
    assert row[0] not in bytes_on_disk(keys)
    assert key.id.bytes not in bytes_on_disk(keys)
    with pytest.raises(DataKeyMissing):
        store.load(key.id)
    store.shred(key.id)
    assert open_sealed(sealed, data_key=store.load(kept.id), binding=BINDING) == b"image"


def test_a_store_that_another_reads_or_writes_says_so(keys, keyring, monkeypatch) -> None:
    monkeypatch.setattr(keystore, "_BUSY_TIMEOUT_S", 0.05)
    path = keys / "keystore.sqlite"
    with (
        closing(KeyStore(path, keyring)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        key, kept = store.create(), store.create()
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM data_keys").fetchone()
        with pytest.raises(RecordsUnavailable, match="not yet overwritten"):
            store.shred(key.id)
        other.execute("ROLLBACK")
        store.shred(key.id)
        assert key.id.bytes not in bytes_on_disk(keys)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RecordsUnavailable):
            store.create()
        assert store.load(kept.id).id == kept.id
        other.execute("ROLLBACK")
        store.create()
    with pytest.raises(RecordsUnavailable):
        store.create()


def test_a_wrapped_key_moved_to_another_row_is_refused(store: KeyStore, keys: Path) -> None:
    first, second = store.create(), store.create()
    moved = "SELECT wrapped FROM data_keys WHERE data_key_id = ?"
    move = f"UPDATE data_keys SET wrapped = ({moved}) WHERE data_key_id = ?"  # noqa: S608
    sqlite(keys / "keystore.sqlite", move, first.id.bytes, second.id.bytes)
    with pytest.raises(IntegrityError):
        store.load(second.id)


def test_wraps_are_counted_and_bounded_and_a_refused_one_takes_no_neighbours_key_with_it(store, keys) -> None:
    for _ in range(3):
        store.shred(store.create().id)
    assert sqlite(keys / "keystore.sqlite", "SELECT key_version, wraps FROM wrap_counts") == [(1, 3)]

    for _ in range(2):
        sqlite(keys / "keystore.sqlite", "UPDATE wrap_counts SET wraps = 2147483648 - 10")
        made: list[UUID] = []

        def make(_: int, made: list[UUID] = made) -> None:
            with suppress(RecordsUnavailable):
                made.append(store.create().id)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(make, range(40)))
        assert len(made) == 10
        assert [store.load(key_id).id for key_id in made] == made
    with pytest.raises(RecordsUnavailable, match="rotate"):
        store.create()


def test_a_damaged_store_is_refused(keys: Path, keyring: FileKeyring) -> None:
    (keys / "keystore.sqlite").touch(mode=0o600)
    (keys / "keystore.sqlite").write_bytes(b"not a database, and long enough to say so" * 100)
    with pytest.raises(IntegrityError, match="damaged"):
        KeyStore(keys / "keystore.sqlite", keyring)


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
    store.destroy(destroyed(second := store.create().id))
    ((first, found),) = store.list_destroyed(limit=1)
    assert found == gone
    assert [found.data_key_id for _, found in store.list_destroyed(after=first)] == [second]


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


def test_many_first_starts_at_once_make_one_keyring_and_keep_every_key(start, keys) -> None:
    body = """
def make(_):
    key = store.create()
    store.load(key.id)
    return str(key.id)
with ThreadPoolExecutor(8) as threads:
    print(*threads.map(make, range(20)))
"""
    ids = _run_together([start(body) for _ in range(3)])
    assert len(set(ids)) == 60
    with closing(KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json"))) as store:
        assert [store.load(key_id).id for key_id in ids] == ids
        with pytest.raises(IntegrityError):  # what was read back never seals
            seal(b"image", data_key=store.load(ids[0]), binding=BINDING)
    assert {file.name for file in keys.iterdir()} == {"keyring.json", "keystore.sqlite"}


def test_no_key_handed_out_is_lost_to_a_kill(start: Started, keys: Path) -> None:
    process = start("while True: print(store.create().id, flush=True)")
    process.stdin.write("go\n")
    process.stdin.flush()
    ids = [process.stdout.readline().strip() for _ in range(100)][1:]
    process.kill()
    ids += process.stdout.read().splitlines()[:-1]  # the last line may be cut short
    with closing(KeyStore(keys / "keystore.sqlite", FileKeyring(keys / "keyring.json"))) as store:
        assert all(store.load(UUID(key_id)) for key_id in ids)


def _run_together(processes: list[subprocess.Popen[str]]) -> list[UUID]:
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    return [UUID(word) for output in outputs for word in output.split()]

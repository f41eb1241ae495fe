"""The keys are backed up apart, for a while only, and never bring an erased image back; nor does what restores keep."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cluster.key_backups import back_up_keys, find_kept_copies, prune, prune_kept_copies, restore_keys
from cluster.safety import copy_findings, prevents_ready
from serve_app.audit.checkpoints import signing_key
from serve_app.domain.errors import Erased, IntegrityError
from serve_app.keys.envelope import data_key_id_of
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import DestroyedKey, KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.settings import KeySettings, NodeFiles
from tests.cluster.clinic import Clinic, flip_a_bit


def test_keys_are_backed_up_apart_and_restored_without_the_erased_ones(
    clinic: Clinic, derm_cds, tmp_path: Path
) -> None:
    home, files, folder = clinic.home, NodeFiles(clinic.home), tmp_path / "keys"
    with closing(clinic.open_keys()):  # in use, its log not empty
        made = derm_cds("backup", "--keys", str(folder), home=home)
    assert made.code == 0, made.err
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        ("manifest.json", "manifest.sig", "keystore.sqlite"), 0o600
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data_keys_by_key_version"]["1"] >= len(clinic.images)
    assert datetime.fromisoformat(manifest["expires_at"]) - datetime.now(UTC) > timedelta(days=29)

    # One is known from the key store that was there alone, the other from the database, where that store is lost.
    by_store, by_database, *kept = clinic.images
    del clinic.images[by_store]
    with closing(clinic.open_keys()) as keys:
        key_id = data_key_id_of(clinic.sealed(by_store)[0])
        keys.destroy(DestroyedKey(data_key_id=key_id, receipt_id=uuid4(), reason="retention", actor="dr"))
    # Whose database it is says the key store that is put back, one from before stores had an id, too.
    other = "INSERT INTO key_stores (store_id) VALUES ($1) ON CONFLICT DO NOTHING"
    clinic.ask(lambda pool: pool.execute(other, uuid4()))
    assert "what was there is in" in derm_cds("restore", "--keys", str(folder), home=home).out
    assert clinic.ask(lambda pool: pool.fetchval("SELECT count(*) FROM key_stores")) == 0
    with pytest.raises(Erased):
        clinic.open_image(by_store)
    clinic.erase(by_database)
    files.keystore.unlink()
    restored = derm_cds("restore", "--keys", str(folder), home=home)
    assert (restored.code, "what was there" in restored.out) == (0, False)
    with pytest.raises(Erased):
        clinic.open_image(by_database)
    assert all(clinic.opens(at) for at in kept)


def test_an_expired_key_backup_is_refused_and_pruned(clinic: Clinic, derm_cds, tmp_path: Path) -> None:
    old, young = tmp_path / "old", tmp_path / "young"
    assert derm_cds("backup", "--keys", str(old), "--days", "0", home=clinic.home).code == 0
    assert derm_cds("backup", "--keys", str(young), home=clinic.home).code == 0
    (tmp_path / "database").mkdir()
    refused = derm_cds("restore", "--keys", str(old), home=clinic.home)
    assert refused.code == 1
    assert "expired" in refused.err
    pruned = derm_cds("backup", "--prune", str(tmp_path), home=clinic.home)
    assert f"{old} had expired and is deleted\n" in pruned.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["database", "young"]
    assert derm_cds("backup", "--prune", str(tmp_path), home=clinic.home).out == "nothing has expired\n"
    query = "SELECT count(*) FROM audit_events WHERE action = 'backup_prune'"
    assert clinic.ask(lambda pool: pool.fetchval(query)) >= 2


def test_a_key_backup_of_another_keyring_or_altered_is_refused_and_the_keyrings_is_apart(
    clinic: Clinic, derm_cds, tmp_path: Path
) -> None:
    files, backup = NodeFiles(clinic.home), tmp_path / "k"
    assert derm_cds("backup", "--keys", str(backup), home=clinic.home).code == 0
    assert derm_cds("backup", "--keyring", str(tmp_path / "safe"), home=clinic.home).code == 0
    assert (tmp_path / "safe" / "keyring.json").read_bytes() == files.keyring.read_bytes()
    assert not (tmp_path / "safe" / "keystore.sqlite").exists()
    before = files.keystore.read_bytes()
    how: dict[str, Any] = {"trusted": signing_key(files.audit_signing_key).public_key(), "erased": []}
    with pytest.raises(IntegrityError, match="did not wrap"):
        restore_keys(files, backup, FileKeyring.make(tmp_path / "other" / "keyring.json"), **how)
    flip_a_bit(backup / "keystore.sqlite")
    with pytest.raises(IntegrityError, match="SHA-256"):
        restore_keys(files, backup, FileKeyring(files.keyring), **how)
    assert files.keystore.read_bytes() == before
    assert not list(files.keystore.parent.glob("*.restored*"))


def ago(**since: float) -> datetime:
    return datetime.now(UTC) - timedelta(**since)


@pytest.fixture
def files(tmp_path: Path) -> NodeFiles:
    """A home with a key store that has a key."""
    files = NodeFiles(tmp_path / "home")
    store = KeyStore(files.keystore, FileKeyring.make(files.keyring))
    store.create()
    store.close()
    return files


def back_up(files: NodeFiles, folder: Path) -> None:
    back_up_keys(files, folder, provider="file:", lifetime=timedelta(days=30))


def test_the_key_store_that_a_restore_set_aside_expires(files: NodeFiles, tmp_path: Path) -> None:
    back_up(files, tmp_path / "backup")
    os.utime(files.keystore, (0, 0))  # unchanged for years, and still kept from today on
    provider = open_key_provider(KeySettings(home=files.home))
    kept = restore_keys(files, tmp_path / "backup", provider, trusted=None, erased=[])
    assert kept is not None
    (copy,) = find_kept_copies(files.home)
    assert copy.path == kept
    assert timedelta(days=29) < copy.expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert prune_kept_copies(files.home) == []
    (finding,) = copy_findings(files.home)
    assert (finding.name, prevents_ready(finding, env="production")) == ("kept_copy", False)

    assert prune_kept_copies(files.home, lifetime=timedelta(0)) == [kept]
    assert copy_findings(files.home) == []
    assert {path.name for path in files.keystore.parent.iterdir()} == {
        "audit-signing.key",
        "keyring.json",
        "keystore.sqlite",
    }


@pytest.mark.usefixtures("own_home")
def test_what_has_expired_is_a_finding_until_it_is_pruned(files: NodeFiles, derm_cds, tmp_path: Path) -> None:
    keys, postgres = files.keystore.parent, files.home / "postgres"
    old = f"before-{ago(days=31):%Y%m%dT%H%M%S}"
    for name in (f"keystore.sqlite.{old}123456", f"keystore.sqlite.{old}123456-wal"):
        (keys / name).write_bytes(b"wrapped")
    (postgres / f"data.{old}" / "base").mkdir(parents=True)
    (postgres / f"data.before-{ago(days=29):%Y%m%dT%H%M%S}").mkdir()
    found = copy_findings(files.home)
    assert [finding.name for finding in found] == ["expired_copy", "expired_copy", "kept_copy"]
    assert all(prevents_ready(finding, env="development") for finding in found[:2])
    (tmp_path / "backups").mkdir()
    pruned = derm_cds("backup", "--prune", str(tmp_path / "backups"), home=files.home)
    assert pruned.code == 0, pruned.err
    assert pruned.out.count("had expired and is deleted") == 2
    assert sorted(path.name for path in keys.iterdir()) == ["keyring.json", "keystore.sqlite"]
    assert len(list(postgres.iterdir())) == 1
    sooner = derm_cds("backup", "--prune", str(tmp_path / "backups"), "--days", "7", home=files.home)
    assert "data.before" in sooner.out
    assert list(postgres.iterdir()) == []
    # What a restore that was killed left goes after a day.
    left = files.keystore.with_name("keystore.sqlite.restored")
    left.write_bytes(b"wrapped")
    assert prune_kept_copies(files.home) == []
    os.utime(left, (ago(hours=25).timestamp(),) * 2)
    assert [finding.name for finding in copy_findings(files.home)] == ["expired_copy"]
    assert prune_kept_copies(files.home) == [left]
    assert files.keystore.exists()


def test_a_killed_key_backup_is_pruned_and_one_at_work_is_not(files: NodeFiles, tmp_path: Path) -> None:
    root = tmp_path / "backups"
    for name in ("killed", "late"):
        back_up(files, root / name)
        (root / name).rename(root / f"{name}.partial")
    (root / "killed.partial" / "manifest.json").unlink()  # before it was written; late: before the rename
    (root / "database.partial" / "data").mkdir(parents=True)
    assert prune(root) == []
    for path in root.rglob("*"):
        os.utime(path, (ago(hours=25).timestamp(),) * 2)
    assert prune(root) == [root / "killed.partial", root / "late.partial"]
    assert [path.name for path in root.iterdir()] == ["database.partial"]

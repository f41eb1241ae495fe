"""What restores keep, and killed ones leave: named by status, deleted in time, and never what is in use."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
import os
from pathlib import Path

import pytest

from cluster.backups import restore
from cluster.key_backups import back_up_keys, find_kept_copies, prune, prune_kept_copies, restore_keys
from cluster.safety import copy_findings, prevents_ready
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.settings import KeySettings, NodeFiles
from tests.cluster.clinic import Clinic


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
    back_up_keys(files, folder, provider="file:", lifetime=timedelta(days=30), service_version="1")


def test_the_key_store_that_a_restore_set_aside_expires(files: NodeFiles, tmp_path: Path) -> None:
    back_up(files, tmp_path / "backup")
    os.utime(files.keystore, (0, 0))  # unchanged for years, and still kept from today on
    provider = open_key_provider(KeySettings(home=files.home))
    kept = restore_keys(files, tmp_path / "backup", provider, erased=[])
    assert kept is not None
    (copy,) = find_kept_copies(files.home)
    assert copy.path == kept
    assert timedelta(days=29) < copy.expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert prune_kept_copies(files.home) == []
    (finding,) = copy_findings(files.home)
    assert (finding.name, prevents_ready(finding, env="production")) == ("kept_copy", False)

    assert prune_kept_copies(files.home, lifetime=timedelta(0)) == [kept]
    assert copy_findings(files.home) == []
    assert {path.name for path in files.keystore.parent.iterdir()} == {"keyring.json", "keystore.sqlite"}


@pytest.fixture
async def audit_log(new_database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of its own: pruning is on record there before anything is deleted."""
    urls = await new_database()
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)


@pytest.mark.usefixtures("audit_log")
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


def test_what_a_killed_restore_left_is_pruned_after_a_day(files: NodeFiles) -> None:
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


def test_the_data_directory_that_a_restore_set_aside_is_found(
    clinic: Clinic, derm_cds, tmp_path: Path
) -> None:
    assert derm_cds("backup", str(tmp_path / "b"), home=clinic.home).code == 0
    clinic.server.stop()
    kept = restore(clinic.server, tmp_path / "b").kept
    assert kept is not None
    assert [copy.path for copy in find_kept_copies(clinic.home)] == [kept]
    assert "kept_copy" in derm_cds("status", home=clinic.home).out
    assert prune_kept_copies(clinic.home, lifetime=timedelta(0)) == [kept]
    assert all(clinic.opens(at) for at in clinic.images)

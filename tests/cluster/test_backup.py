"""The drill: back up while serving, lose everything, restore, and have it all again; but for what was erased."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
import json
import os
from pathlib import Path
import shutil
import sqlite3
import tempfile

import pytest

from cluster import backup_folder
from cluster.backup_folder import BackupFailed
from cluster.backups import back_up, restore
from cluster.key_backups import find_kept_copies, prune_kept_copies
from cluster.postgres import PostgresFailed, PostgresState
from cluster.running import occupy
from serve_app.domain.errors import Conflict, Erased, IntegrityError, NotFound
from serve_app.erasure.eraser import Eraser
from serve_app.records.erasures import ErasureStore
from serve_app.records.lesions import LesionStore
from serve_app.settings import NodeFiles
from tests.cluster.clinic import Clinic, flip_a_bit


def test_the_drill(clinic: Clinic, derm_cds, good: Path) -> None:
    """Everything is readable again, the audit chain verifies, and what was erased meanwhile is not and is erased again."""
    home, server = clinic.home, clinic.server
    assert {path.name for path in good.iterdir()} == {"manifest.json", "manifest.sig", "data"}
    assert good.stat().st_mode & 0o777 == 0o700
    # Done, recorded and signed after the backup: what a restore takes away.
    erased, *kept = clinic.images
    erasure = clinic.erase(erased)
    clinic.add_images(1)
    added = list(clinic.images)[-1]
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    server.stop(mode="immediate")
    away = server.data.rename(server.data.with_name("away"))
    with pytest.raises(PostgresFailed, match="is gone"):  # and not silently an empty one
        server.ensure()
    away.rename(server.data)

    # As an earlier build names its schema: the steps up to the baseline have no files any more.
    clinic.sign(good, schema="0014_purpose")
    restored = derm_cds("restore", str(good), home=home)
    assert restored.code == 0, restored.err
    assert "as it was at" in restored.out
    (copy,) = find_kept_copies(home)
    assert str(copy.path) in restored.out
    assert {path.name for path in copy.path.iterdir()} >= {"PG_VERSION", "base"}
    assert "kept_copy" in derm_cds("status", home=home).out
    assert all(clinic.opens(at) for at in kept)
    assert clinic.ask(lambda pool: LesionStore(pool).sealed_image(*added)) is None
    del clinic.images[added]
    verified = derm_cds("audit", "verify", home=home)
    assert verified.code == 0, verified.err
    assert verified.out.startswith("restored, ")  # and says that what was signed meanwhile no longer holds
    assert derm_cds("audit", "checkpoint", home=home).code == 0  # the log goes on
    events = "SELECT action FROM audit_events WHERE action IN ('backup', 'restore') ORDER BY event_id"
    assert [row["action"] for row in clinic.ask(lambda pool: pool.fetch(events))][-2:] == [
        "backup",
        "restore",
    ]
    amcheck = "SELECT count(*) FROM pg_extension WHERE extname = 'amcheck'"
    assert clinic.ask(lambda pool: pool.fetchval(amcheck)) == 0
    assert derm_cds("migrate", home=home).out == "up to date\n"

    # The ciphertext is back, the erasure forgotten: nothing opens it, and it is erased again with its old receipt.
    assert clinic.ask(lambda pool: pool.fetchval("SELECT count(*) FROM erasures")) == 0
    with pytest.raises(Erased):
        clinic.open_image(erased)
    with closing(clinic.open_keys()) as keys:
        assert clinic.ask(lambda pool: Eraser(ErasureStore(pool), keys).erase_restored()) == 1
        again = clinic.ask(lambda pool: Eraser(ErasureStore(pool), keys).find(*erased))
    assert (again.receipt_id, again.ciphertext_sha256) == (erasure.receipt_id, erasure.ciphertext_sha256)
    sealed = "SELECT sealed FROM lesion_images WHERE image_id = $1"
    assert clinic.ask(lambda pool: pool.fetchval(sealed, erased[1])) is None
    assert prune_kept_copies(home, lifetime=timedelta(0)) == [copy.path]


def test_a_backup_holds_neither_keys_nor_images_in_clear(clinic: Clinic, good: Path) -> None:
    everything = b"".join(path.read_bytes() for path in good.rglob("*") if path.is_file())
    secrets = [json.loads(NodeFiles(clinic.home).keyring.read_bytes())["keys"]["1"].encode()]
    with closing(sqlite3.connect(NodeFiles(clinic.home).keystore)) as store:
        secrets += [row[0] for row in store.execute("SELECT wrapped FROM data_keys")]
    state = PostgresState.read(clinic.server.state_file)
    secrets += [content[-64:] for content in clinic.images.values()]
    secrets += [state.app_password.encode(), state.superuser_password.encode()]
    assert not any(secret in everything for secret in secrets)


def test_another_machine_restores_it_with_passwords_of_its_own(clinic: Clinic, good: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        other = Clinic(Path(folder), dict(clinic.images))
        assert restore(other.server, good, clinic.public_key).kept is None
        try:
            assert not list((other.server.directory / "setup").iterdir())
            assert other.server.ensure() != clinic.server.ensure()
            shutil.copytree(clinic.home / "keys", other.home / "keys")
            assert all(other.opens(at) for at in other.images)
            owner = (other.server.data / "PG_VERSION").stat().st_uid
            assert {path.stat().st_uid for path in other.server.data.rglob("*")} == {owner}
        finally:
            other.server.stop(mode="immediate")


def test_a_backup_that_cannot_be_made_leaves_nothing(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    (tmp_path / "c.partial").mkdir()
    for name, said in (("b", "not empty"), ("c", "cut off")):
        with pytest.raises(Conflict, match=said):
            back_up(clinic.server, tmp_path / name)
    with monkeypatch.context() as full:
        full.setattr(backup_folder, "_SPARE_BYTES", 2**60)
        with pytest.raises(BackupFailed, match="are needed"):
            back_up(clinic.server, tmp_path / "d")
    unreachable = {"PGHOST": "/nowhere", "PGPORT": "1"}
    monkeypatch.setattr(PostgresState, "superuser_environment", lambda *_: unreachable)
    with pytest.raises(BackupFailed, match="psql failed"):
        back_up(clinic.server, tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c.partial"]


def test_nothing_is_restored_under_a_running_service(clinic: Clinic, good: Path) -> None:
    with pytest.raises(Conflict, match="derm-cds stop"):
        restore(clinic.server, good, clinic.public_key)
    clinic.server.stop()
    with occupy(clinic.home), pytest.raises(Conflict, match="derm-cds stop"):
        restore(clinic.server, good, clinic.public_key)


def test_a_damaged_backup_is_refused_and_changes_nothing(clinic: Clinic, good: Path, tmp_path: Path) -> None:
    clinic.server.stop()
    log = next(path for path in (good / "data" / "pg_wal").iterdir() if len(path.name) == 24)
    damages: dict[str, tuple[Callable[[Path], object], type[Exception]]] = {
        "data/base/1/1259": (flip_a_bit, IntegrityError),
        f"data/pg_wal/{log.name}": (Path.unlink, IntegrityError),
        "data/backup_manifest": (flip_a_bit, IntegrityError),
        "manifest.json": (Path.unlink, NotFound),
    }
    before = sorted(path.name for path in clinic.server.directory.iterdir())
    for number, (name, (damage, error)) in enumerate(damages.items()):
        bad = tmp_path / f"bad-{number}"
        shutil.copytree(good, bad, copy_function=os.link)
        damage(bad / name)
        with pytest.raises(error):
            restore(clinic.server, bad, clinic.public_key)
        assert sorted(path.name for path in clinic.server.directory.iterdir()) == before
        assert not list((clinic.server.directory / "setup").iterdir())
    assert all(clinic.opens(at) for at in clinic.images)


@pytest.mark.parametrize(
    ("field_", "value", "error", "said"),
    [
        ("format", 3, IntegrityError, "another version"),
        ("kind", "keys", IntegrityError, "backup of the keys"),
        ("postgres_version", "17.4", BackupFailed, "cannot read it"),
        ("schema", "9999_future", BackupFailed, "install a newer one"),
    ],
)
def test_a_backup_of_another_kind_is_refused(
    clinic: Clinic, good: Path, tmp_path: Path, field_, value, error, said
) -> None:
    (tmp_path / "manifest.json").write_bytes((good / "manifest.json").read_bytes())
    clinic.sign(tmp_path, **{field_: value})
    with pytest.raises(error, match=said):
        restore(clinic.server, tmp_path, clinic.public_key)


def test_an_operators_own_database_is_theirs_to_back_up(
    clinic: Clinic, derm_cds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DERM_DATABASE_URL", clinic.server.ensure().app)
    said = derm_cds("backup", str(tmp_path / "b"), home=clinic.home)
    assert said.code == 1
    assert "your own PostgreSQL" in said.err

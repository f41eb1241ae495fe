"""Who can write where the backups lie, and who could once write to the database, runs nothing at a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import json
import os
from pathlib import Path
import shutil
import tempfile

import pytest

from cluster import backups
from cluster.backup_folder import digest, digests
from cluster.backups import back_up, check, restore
from cluster.key_backups import prune
from serve_app.audit.checkpoints import signing_key
from serve_app.domain.errors import IntegrityError
from serve_app.settings import NodeFiles
from tests.cluster.clinic import Clinic


@pytest.fixture
def proof() -> Iterator[Path]:
    """A file that the server's account could make: there once something has run."""
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder) / "has-run"


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy of the backup, to be changed."""
    return Path(shutil.copytree(good, tmp_path / "copy", copy_function=os.link))


def rewrite(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # it may be linked to
    path.write_bytes(content)


def add_command(folder: Path, proof: Path) -> None:
    path = folder / "data" / "postgresql.auto.conf"
    settings = f"archive_mode = 'on'\narchive_command = 'touch {proof}'\n"
    rewrite(path, path.read_bytes() + settings.encode())


def test_a_command_slipped_into_a_backup_is_not_run(
    clinic: Clinic, derm_cds, copy: Path, proof: Path
) -> None:
    """PostgreSQL's own check leaves postgresql.auto.conf out."""
    add_command(copy, proof)
    clinic.server.stop()
    refused = derm_cds("restore", str(copy), home=clinic.home)
    assert not proof.exists()
    assert refused.code == 1
    assert "postgresql.auto.conf has settings" in refused.err
    # Nor where the node itself has signed it, as when somebody used ALTER SYSTEM.
    clinic.sign(copy, files=digests(copy))
    assert (
        "postgresql.auto.conf has settings" in derm_cds("backup", "--check", str(copy), home=clinic.home).err
    )
    with pytest.raises(IntegrityError, match="has settings"):
        restore(clinic.server, copy, clinic.public_key)
    assert not proof.exists()


def test_what_a_superuser_left_to_run_at_a_login_is_not_run(
    clinic: Clinic, derm_cds, tmp_path: Path, proof: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "planted"
    clinic.as_superuser(
        "CREATE FUNCTION planted() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        f" $$ BEGIN COPY (SELECT 1) TO PROGRAM 'touch {proof}'; END $$",
        "CREATE EVENT TRIGGER planted ON login EXECUTE FUNCTION planted()",
    )
    try:
        with pytest.raises(IntegrityError, match="the event trigger planted; the function"):
            back_up(clinic.server, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        with monkeypatch.context() as before:  # as a version did that did not look
            before.setattr(backups, "_refuse_foreign", lambda _: None)
            back_up(clinic.server, folder)
    finally:
        clinic.as_superuser("DROP EVENT TRIGGER planted", "DROP FUNCTION planted")
        clinic.server.stop()
    proof.unlink(missing_ok=True)
    refused = derm_cds("restore", str(folder), home=clinic.home)
    assert not proof.exists()
    assert (refused.code, "the event trigger planted" in refused.err) == (1, True)


def test_whatever_could_act_as_the_superuser_is_refused(clinic: Clinic, tmp_path: Path) -> None:
    planted = {
        "CREATE ROLE planted SUPERUSER": "DROP ROLE planted",
        "GRANT pg_execute_server_program TO derm_app": "REVOKE pg_execute_server_program FROM derm_app",
        "ALTER ROLE derm_app SET local_preload_libraries = 'planted'": "ALTER ROLE derm_app RESET ALL",
        "CREATE TABLE planted_table (id int)": "DROP TABLE planted_table",
        "CREATE FUNCTION planted() RETURNS int SECURITY DEFINER RETURN 1": "DROP FUNCTION planted",
        "CREATE FUNCTION compiled(int) RETURNS int LANGUAGE internal AS 'int4abs'": "DROP FUNCTION compiled",
    }
    clinic.as_superuser(*planted)
    try:
        with pytest.raises(IntegrityError) as refused:
            back_up(clinic.server, tmp_path / "refused")
    finally:
        clinic.as_superuser(*planted.values())
    assert str(refused.value).split(": ", 1)[1].rstrip(".").split("; ") == [
        "the role planted may more than ours",
        "the role derm_app belongs to pg_execute_server_program",
        "a setting of a role or a database (local_preload_libraries=planted)",
        "the relation public.planted_table of a superuser",
        "the function public.planted()",
        "the function public.compiled(integer)",
    ]


def test_what_is_not_signed_here_is_refused(clinic: Clinic, good: Path, copy: Path, tmp_path: Path) -> None:
    other, manifest, signature = Clinic(tmp_path / "other"), copy / "manifest.json", copy / "manifest.sig"
    attacks: dict[str, Callable[[], object]] = {
        "standby.signal is in the backup": (copy / "data/standby.signal").touch,
        "is a link": lambda: (copy / "data/pg_tblspc/16399").symlink_to("/etc"),
        "is no file": lambda: os.mkfifo(copy / "data/pipe"),
        "backup_label is not what": lambda: rewrite(copy / "data/backup_label", b"x"),
        "backup_label is gone": (copy / "data/backup_label").unlink,
        "not signed by": lambda: other.sign(copy),
        "is not signed by": signature.unlink,
        "held against": lambda: rewrite(manifest, manifest.read_bytes() + b" "),
        "is not signed: it says": lambda: rewrite(manifest, unsigned(copy)),
        "base/planted is in the backup and not": lambda: (copy / "data/base/planted").write_bytes(b"x"),
    }
    for said, attack in attacks.items():
        shutil.rmtree(copy)
        shutil.copytree(good, copy, copy_function=os.link)
        attack()
        with pytest.raises(IntegrityError, match=said):
            check(copy, clinic.public_key)
    # As a restore does with its copy.
    clinic.server.stop()
    with pytest.raises(IntegrityError, match="base/planted is in the backup and not"):
        restore(clinic.server, copy, clinic.public_key)
    assert not list((clinic.server.directory / "setup").iterdir())
    assert all(clinic.opens(at) for at in clinic.images)


def test_what_lies_beside_a_backup_is_refused_by_check_and_restore(
    clinic: Clinic, derm_cds, copy: Path, tmp_path: Path
) -> None:
    keys, rings = tmp_path / "keys", tmp_path / "rings"
    assert derm_cds("backup", "--keys", str(keys), home=clinic.home).code == 0
    assert derm_cds("backup", "--keyring", str(rings), home=clinic.home).code == 0
    clinic.server.stop()
    for folder, restoring in ((copy, ["restore"]), (keys, ["restore", "--keys"]), (rings, [])):
        for add, remove in (("touch", "unlink"), ("mkdir", "rmdir")):
            beside = folder / "beside"
            getattr(beside, add)()
            for command in (["backup", "--check"], restoring):
                if command:
                    refused = derm_cds(*command, str(folder), home=clinic.home)
                    assert (refused.code, refused.err) == (
                        1,
                        "derm-cds: beside is in the backup and not in its manifest.\n",
                    )
            getattr(beside, remove)()
        assert derm_cds("backup", "--check", str(folder), home=clinic.home).code == 0
    for none, why in ((copy / "manifest.json", "no such folder"), (tmp_path, "no manifest.json")):
        refused = derm_cds("backup", "--check", str(none), home=clinic.home)
        assert (refused.code, refused.err.count("\n"), why in refused.err) == (1, 1, True)


def unsigned(folder: Path) -> bytes:
    """The manifest as it was before backups were signed."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["files"]
    return json.dumps(
        manifest | {"format": 1, "backup_manifest_sha256": digest(folder / "data" / "backup_manifest")}
    ).encode()


def test_an_unsigned_backup_is_taken_only_when_told_and_runs_nothing(
    clinic: Clinic, derm_cds, copy: Path, proof: Path
) -> None:
    rewrite(copy / "manifest.json", unsigned(copy))
    (copy / "manifest.sig").unlink()
    clinic.server.stop()
    refused = derm_cds("restore", str(copy), home=clinic.home)
    assert (refused.code, "--accept-unsigned" in refused.err) == (1, True)
    taken = derm_cds("restore", "--accept-unsigned", str(copy), home=clinic.home)
    assert taken.code == 0, taken.err
    query = (
        "SELECT detail ->> 'signed' FROM audit_events WHERE action = 'restore' ORDER BY event_id DESC LIMIT 1"
    )
    assert clinic.ask(lambda pool: pool.fetchval(query)) == "false"
    add_command(copy, proof)
    with pytest.raises(IntegrityError, match="has settings"):
        check(copy, None)


def test_pruning_follows_no_link_to_a_key_store_in_use(clinic: Clinic, derm_cds, tmp_path: Path) -> None:
    assert derm_cds("backup", "--keys", str(tmp_path / "old"), "--days", "0", home=clinic.home).code == 0
    store = NodeFiles(clinic.home).keystore
    before = store.read_bytes()
    (tmp_path / "old" / "keystore.sqlite").unlink()
    (tmp_path / "old" / "keystore.sqlite").symlink_to(store)
    assert prune(tmp_path) == [tmp_path / "old"]
    assert store.read_bytes() == before


def test_a_bare_machine_needs_the_public_key(good: Path, clinic: Clinic, derm_cds, tmp_path: Path) -> None:
    """And has nothing to carry over: retention waits there until an operator has seen to it."""
    pem = tmp_path / "audit.pem"
    pem.write_text(derm_cds("audit", "public-key", home=clinic.home).out)
    with tempfile.TemporaryDirectory(prefix="derm-test-") as folder:
        other = Clinic(Path(folder))
        refused = derm_cds("restore", str(good), home=other.home)
        assert (refused.code, "--public-key" in refused.err) == (1, True)
        signing_key(NodeFiles(other.home).audit_signing_key)  # it has its own by now
        refused = derm_cds("restore", str(good), home=other.home)
        assert (refused.code, "is not signed by the key" in refused.err) == (1, True)
        try:
            restored = derm_cds("restore", "--public-key", str(pem), str(good), home=other.home)
            assert restored.code == 0, restored.err
            assert "retention waits" in restored.out
            assert "retention_paused" in derm_cds("status", home=other.home).out
            resumed = derm_cds("retention", "resume", home=other.home)
            assert resumed.code == 0, resumed.err
            assert "retention_paused" not in derm_cds("status", home=other.home).out
            assert derm_cds("retention", "resume", home=other.home).code == 1
            query = "SELECT count(*) FROM audit_events WHERE action = 'retention_resume'"
            assert other.ask(lambda pool: pool.fetchval(query)) == 1
        finally:
            other.server.stop(mode="immediate")

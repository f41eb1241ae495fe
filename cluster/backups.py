"""Backing up the embedded database while it serves, and restoring it.

    FOLDER/manifest.json, manifest.sig   ours: see backup_folder
    FOLDER/data/                         the data directory, with PostgreSQL's own backup_manifest

Neither the key store nor a key-encryption key is in it: alone, it opens no image.

What is restored is checked as files, started apart and checked as a database, then put in place. The server that
checks it listens on a socket of its own, which only this user may open (peer authentication, no port), and has our
settings on its command line, where nothing that the backup holds overrides them. There the roles also get this home's
passwords: a backup of another machine's has others. What the restore must not undo is carried over there (carry_over).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
import logging
import os
from pathlib import Path
import pwd
import secrets
import shutil
import subprocess
import tempfile
from typing import Any

from asyncpg import PostgresError
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.backup_folder import (
    BackupFailed,
    new_folder,
    read_manifest,
    refuse_others,
    regular_files,
    require_space,
    tree_bytes,
    verify_file,
    verify_files,
    write_manifest,
)
from cluster.carry_over import carry_over, newest_event, read_replaced
from cluster.postgres import (
    DATABASE,
    HERE,
    OWNER,
    SUPERUSER,
    EmbeddedPostgres,
    PostgresFailed,
    PostgresState,
    configuration,
    programs,
)
from cluster.running import AlreadyRunning, occupy
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.erasure.sweeping import pause
from serve_app.private_files import sync_folder
from serve_app.records.migrate import MIGRATIONS, read_migrations
from serve_app.settings import NodeFiles

_QUIET = ("--no-psqlrc", "--quiet")
_ROWS = (*_QUIET, "--tuples-only", "--no-align")
_SCHEMA = "SELECT name FROM schema_migrations ORDER BY version DESC LIMIT 1"
#: Every file against `backup_manifest`, and the log read through.
_VERIFY = ("--exit-on-error", "--quiet")
_PORT = 5432  # names the socket's file; nothing listens on it
_TIMEOUT_S = 600
#: What none of our backups has: orders to recover from elsewhere, and tablespaces, which lie elsewhere.
_NEVER = ("*.signal", "recovery.conf", "tablespace_map", "pg_tblspc/*")

#: What would have a session run something before its first statement. A client's settings come before those of its
#: role and its database.
_SESSION = {
    "session_preload_libraries": "",
    "local_preload_libraries": "",
    "event_triggers": "off",
    "jit": "off",
}
#: What would have the server run something, or go elsewhere, before or beside what it is asked. The command line
#: comes before any file.
_SERVER = _SESSION | {
    "listen_addresses": "",
    "archive_mode": "off",
    "archive_command": "",
    "archive_library": "",
    "archive_cleanup_command": "",
    "recovery_end_command": "",
    "restore_command": "",
    "primary_conninfo": "",
    "shared_preload_libraries": "",
    "oauth_validator_libraries": "",
    "dynamic_library_path": "$libdir",
    "extension_control_path": "$system",
    "ssl": "off",
    "ssl_passphrase_command": "",
    "autovacuum": "off",
    "max_logical_replication_workers": "0",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: of which time the backup is, where what was there is, how many changes it carried over.

    `doubt`: why retention waits; None when it does not.
    """

    made_at: str
    kept: Path | None
    carried: int
    doubt: str | None


def back_up(server: EmbeddedPostgres, folder: Path) -> dict[str, Any]:
    """Back up a running server into `folder`, verify and sign what was written, and return the manifest.

    Conflict when the folder is not empty, BackupFailed when the disk is too small or PostgreSQL's
    programs say so, IntegrityError for what a restore would refuse; `folder` is not there then.
    """
    state = PostgresState.read(server.state_file)
    if state is None or not server.is_running():
        raise BackupFailed("The embedded database does not run: there is nothing to back up.")
    environment = state.superuser_environment(server.socket_directory(state)) | _options(_SESSION)
    require_space(folder, tree_bytes(server.data))
    _refuse_foreign(environment)
    # What it asks of a table its owner may have made something else of.
    owner = {"PGUSER": OWNER, "PGPASSWORD": state.owner_password, "PGOPTIONS": ""}
    with new_folder(folder) as partial:
        data = partial / "data"
        options = ["--pgdata", data, "--format", "plain", "--wal-method", "stream", "--checkpoint", "fast"]
        options += ["--manifest-checksums", "SHA256", "--label", "derm-cds", "--no-password"]
        run("pg_basebackup", *options, environment=environment)
        _refuse_settings(data)
        run("pg_verifybackup", *_VERIFY, data)
        return write_manifest(
            partial,
            "database",
            NodeFiles(server.home).audit_signing_key,
            postgres_version=run("postgres", "--version").split()[-1],
            schema=_schema(environment | owner),
            bytes=tree_bytes(data),
        )


def check(folder: Path, trusted: Ed25519PublicKey | None) -> dict[str, Any]:
    """Hold a backup, of whatever kind, against its manifest where it lies; return that. Errors as `restore` has them."""
    manifest = read_manifest(folder, None, trusted)
    refuse_others(folder, manifest)
    if manifest["kind"] == "database":
        _verify(folder, manifest)
    else:
        verify_files(folder, manifest)
    return manifest


def _verify(folder: Path, manifest: dict[str, Any]) -> None:
    """IntegrityError or BackupFailed unless `folder`/data is what was backed up, and nothing that we do not write."""
    data = folder / "data"
    for _ in regular_files(data):
        pass
    _refuse_settings(data)
    if "files" in manifest:
        verify_files(folder, manifest)
    else:
        verify_file(data / "backup_manifest", manifest.get("backup_manifest_sha256", ""))
    run("pg_verifybackup", *_VERIFY, data)


def _refuse_settings(data: Path) -> None:
    """IntegrityError for what would have the server do as the backup wishes; pg_verifybackup leaves these files out."""
    for pattern in _NEVER:
        for path in data.glob(pattern):
            raise IntegrityError(f"{path.name} is in the backup: no database of this service has one.")
    lines = (data / "postgresql.auto.conf").read_text(errors="replace").splitlines()
    if any(line.strip() and not line.startswith("#") for line in lines):
        raise IntegrityError(
            "postgresql.auto.conf has settings, which this service never makes: "
            "ALTER SYSTEM RESET ALL (what you need belongs into postgres/etc/local.conf)."
        )


def _refuse_foreign(environment: Mapping[str, str]) -> None:
    """IntegrityError where a server has what could act as its superuser, and is not ours; see foreign.sql."""
    query = "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn"
    found: dict[str, None] = {}
    for name in run("psql", *_ROWS, "-c", query, environment=environment).splitlines():
        at = {**environment, "PGDATABASE": name}
        found |= dict.fromkeys(
            run("psql", *_ROWS, "--file", HERE / "foreign.sql", environment=at).splitlines()
        )
    if found:
        raise IntegrityError(
            f"The database has what this service never makes: {'; '.join(list(found)[:10])}."
        )


def _options(settings: Mapping[str, str]) -> dict[str, str]:
    """Have a client ask for these settings of its session."""
    return {"PGOPTIONS": " ".join(f"-c {name}={value}" for name, value in settings.items())}


def run(program: str, *arguments: object, environment: Mapping[str, str] | None = None) -> str:
    """Run one of PostgreSQL's programs as ourselves; return what it said. BackupFailed when it fails."""
    done = subprocess.run(
        [programs() / program, *(str(argument) for argument in arguments)],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC", **(environment or {})},
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise BackupFailed(f"{program} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def _schema(environment: Mapping[str, str]) -> str:
    options = [*_ROWS, "--dbname", DATABASE]
    known = run("psql", *options, "-c", "SELECT to_regclass('schema_migrations')", environment=environment)
    return run("psql", *options, "-c", _SCHEMA, environment=environment) if known else ""


def restore(server: EmbeddedPostgres, folder: Path, trusted: Ed25519PublicKey | None) -> Restored:
    """Put the backup in `folder`, which `trusted` signed (None: whoever did), in the place of the server's data directory.

    What it replaces is read first, for what must not be undone; where that cannot be, retention is paused.
    Conflict while the service or its database runs; IntegrityError or BackupFailed when the backup
    is damaged, changed, not signed so, or made by a newer version. Nothing has changed then.
    """
    manifest = read_manifest(folder, "database", trusted)
    refuse_others(folder, manifest)
    _refuse_newer(manifest)
    with out_of_service(server.home), server.alone() as state:
        if server.is_running():
            raise Conflict("The database runs here: `derm-cds stop` first.")
        backup = folder / "data"
        for _ in regular_files(backup):  # before any is read: a pipe would never end
            pass
        require_space(server.directory, tree_bytes(backup))
        server.lay_out()
        with _workplace(server) as place:
            fresh = place / "data"
            shutil.copytree(backup, fresh, symlinks=True)
            _verify(place, manifest)  # the copy: what lies in the store may change at any time
            _hand_over(server, place)
            with _apart(server, fresh, place) as at:
                _refuse_foreign(at)
                # Every table and index is read, and each index held against its table.
                run("pg_amcheck", "--install-missing", "--heapallindexed", DATABASE, environment=at)
                run("psql", *_QUIET, "-c", "DROP EXTENSION amcheck", environment=at)
                owner = {**state.superuser_environment(None), **at}
                for script in ("postgres_roles.sql", "restore_roles.sql"):
                    run("psql", *_QUIET, "--file", HERE / script, environment=owner)
                detail = {"kind": "database", "made_at": manifest["made_at"], "signed": trusted is not None}
                carried, doubt = _carry_over(server, place, at, detail)
            server.run("initdb", "--sync-only", "-D", fresh)
            if doubt:
                pause(NodeFiles(server.home).retention_paused, f"a restore: {doubt}")
            kept = _put_in_place(server, fresh)
        state.ready = True
        state.write(server.state_file)
    return Restored(manifest["made_at"], kept, carried, doubt)


def _carry_over(
    server: EmbeddedPostgres, place: Path, at: Mapping[str, str], detail: Mapping[str, object]
) -> tuple[int, str | None]:
    """Carry over what the restore must not undo, and record it; returns how many changes, and what is in doubt."""
    replaced = None
    if (server.data / "PG_VERSION").exists():
        newest = asyncio.run(newest_event(at))
        beside = place / "replaced"
        server.account.own(beside, 0o700)
        try:
            server.clear_leftovers()
            with _apart(server, server.data, beside) as there:
                replaced = asyncio.run(read_replaced(there, newest))
        except (BackupFailed, PostgresFailed, PostgresError, OSError) as error:
            _log.warning("What is replaced cannot be read: %s", error)
    try:
        return asyncio.run(carry_over(at, replaced, detail))
    except PostgresError as error:  # of a schema from before the tables there are now
        raise BackupFailed(f"What it replaces cannot be carried over into the backup: {error}") from error


@contextmanager
def out_of_service(home: Path) -> Iterator[None]:
    """Keep the service of this home from starting while the block runs; Conflict when it runs."""
    try:
        with occupy(home):
            yield
    except AlreadyRunning as error:
        raise Conflict("The service runs here: `derm-cds stop` first.") from error


def _refuse_newer(manifest: dict[str, Any]) -> None:
    ours = run("postgres", "--version").split()[-1]
    theirs = str(manifest["postgres_version"])
    if theirs.split(".", maxsplit=1)[0] != ours.split(".")[0]:
        raise BackupFailed(f"The backup is of PostgreSQL {theirs}; this is {ours}, which cannot read it.")
    # By its number: what is older than the baseline has another name here, or none.
    newest = read_migrations(MIGRATIONS)[-1].name
    if str(manifest["schema"])[:4] > newest[:4]:
        raise BackupFailed(
            f"The backup has the schema {manifest['schema']}, which this version does not know: install a newer one."
        )


@contextmanager
def _workplace(server: EmbeddedPostgres) -> Iterator[Path]:
    """A folder on the data directory's own file system, for a rename to be all that is left to do."""
    setup = server.directory / "setup"
    for leftover in setup.glob("restore-*"):  # of one that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    place = setup / f"restore-{secrets.token_hex(4)}"
    server.account.own(place, 0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _hand_over(server: EmbeddedPostgres, place: Path) -> None:
    """Make everything in it the server account's."""
    for path in (place, *place.rglob("*")):
        if server.account.switch:
            os.chown(path, server.account.uid, server.account.gid)
        path.chmod(0o700 if path.is_dir() else 0o600)


@contextmanager
def _apart(server: EmbeddedPostgres, data: Path, place: Path) -> Iterator[dict[str, str]]:
    """Run a server on `data`, for this user alone, configured in `place`; yields the environment that finds it."""
    with tempfile.TemporaryDirectory(prefix="derm-restore-") as folder:
        sockets = Path(folder)  # in the home its path may be too long for a socket
        server.account.own(sockets, 0o700)
        _configure(server, data, place, sockets)
        at = place.relative_to(server.directory)  # pg_ctl builds a shell command, see EmbeddedPostgres
        where = ("-D", data.relative_to(server.directory))
        ours = " ".join(f"-c {name}='{value}'" for name, value in _SERVER.items())
        command_line = f"-c config_file={at}/postgresql.conf {ours}"
        try:
            server.run(
                "pg_ctl", "start", *where, "-l", at / "log", "-o", command_line, "-w", "-t", _TIMEOUT_S
            )
        except Exception as error:
            log = place / "log"
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise BackupFailed(f"The database in {data} does not start.\n{said}") from error
        try:
            found = {
                "PGHOST": str(sockets),
                "PGPORT": str(_PORT),
                "PGUSER": SUPERUSER,
                "PGDATABASE": DATABASE,
            }
            yield found | _options(_SESSION)
        finally:
            server.run("pg_ctl", "stop", *where, "-m", "fast", "-w", "-t", _TIMEOUT_S)


def _configure(server: EmbeddedPostgres, data: Path, place: Path, sockets: Path) -> None:
    settings = configuration(data=data, hba=place / "pg_hba.conf", socket=sockets, port=_PORT)
    ident = str(place / "pg_ident.conf").replace("'", "''")
    user = pwd.getpwuid(os.geteuid()).pw_name
    written = {
        "postgresql.conf": f"{settings}\nident_file = '{ident}'\n",
        "pg_hba.conf": "local all all peer map=restore\n",
        "pg_ident.conf": "".join(f'restore "{user}" {role}\n' for role in (SUPERUSER, OWNER)),
    }
    for name, text in written.items():
        (place / name).write_text(text)
        os.chown(place / name, server.account.uid, server.account.gid)


def _put_in_place(server: EmbeddedPostgres, fresh: Path) -> Path | None:
    kept = None
    if server.data.exists():
        kept = server.data.with_name(f"data.before-{datetime.now(UTC):%Y%m%dT%H%M%S}")
        server.data.rename(kept)
    fresh.rename(server.data)
    sync_folder(server.directory)
    sync_folder(fresh.parent)
    return kept

"""Backing up the embedded database while it serves, and restoring it.

    FOLDER/manifest.json   ours: when, which versions and schema, the digest of PostgreSQL's own manifest
    FOLDER/data/           the data directory, with backup_manifest: the SHA-256 of every file

Neither the key store nor a key-encryption key is in it: alone, it opens no image. It is written beside its place and
moved there whole.

What is restored is checked as files, started apart and checked as a database, then put in place. The server that
checks it listens on a socket of its own, which only this user may open (peer authentication, no port). There the
roles also get this home's passwords: a backup of another machine's has others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import version
import json
import os
from pathlib import Path
import pwd
import secrets
import shutil
import subprocess
import tempfile
from typing import Any

from cluster.postgres import (
    DATABASE,
    HERE,
    SUPERUSER,
    EmbeddedPostgres,
    PostgresState,
    configuration,
    programs,
)
from cluster.running import AlreadyRunning, occupy
from serve_app.domain.errors import Conflict, DermError, IntegrityError, NotFound
from serve_app.private_files import sync_folder, write_private
from serve_app.records.migrate import MIGRATIONS, read_migrations

#: What a manifest of this version of the service looks like.
FORMAT = 1

_MANIFEST = "manifest.json"
_SPARE_BYTES = 64 * 1024**2
_QUIET = ("--no-psqlrc", "--quiet")
_SCHEMA = "SELECT name FROM schema_migrations ORDER BY version DESC LIMIT 1"
#: Every file against `backup_manifest`, and the log read through.
_VERIFY = ("--exit-on-error", "--quiet")
_PORT = 5432  # names the socket's file; nothing listens on it
_TIMEOUT_S = 600


class BackupFailed(DermError):
    """The backup could not be made, or cannot be restored."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Have FOLDER.partial (0700) to write into; it becomes `folder` when the block ends well, and goes otherwise.

    Conflict when there is something at `folder` already, or another backup is writing to it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is not empty: a backup needs a folder of its own.")
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        raise Conflict(
            f"{partial} is there: another backup is at work, or was cut off. Remove it then."
        ) from None
    try:
        yield partial
        sync_folder(partial)
        partial.rename(folder)  # an empty folder gives way
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path, kind: str, **values: object) -> dict[str, Any]:
    """Write what the backup is, and return it: `kind`, `format`, `made_at` (RFC 3339), and `values`."""
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "service_version": version("pms-derm-cds"),
        **values,
    }
    write_private(folder / _MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """Read what a backup is. NotFound when it is none, IntegrityError when it is of another kind or format."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        known = manifest["format"] == FORMAT
        found = manifest["kind"]
    except FileNotFoundError:
        raise NotFound(f"{folder} is no backup of this service: it has no {_MANIFEST}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{folder / _MANIFEST} is damaged.") from error
    if not known:
        raise IntegrityError(
            f"{folder} was made by another version: format {manifest['format']}, not {FORMAT}."
        )
    if kind != found:
        raise IntegrityError(f"{folder} is a backup of the {found}, not of the {kind}.")
    return dict(manifest)


def verify_file(path: Path, expected: str) -> None:
    """IntegrityError unless the file's SHA-256 is the one its manifest names."""
    if digest(path) != expected:
        raise IntegrityError(f"{path} is not what was backed up: its SHA-256 has changed.")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def tree_bytes(folder: Path) -> int:
    """How much a folder holds; files that vanish meanwhile count for nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def require_space(where: Path, wanted: int) -> None:
    """BackupFailed unless the file system of `where` (or its nearest parent that exists) has room, and 64 MiB to spare."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < wanted + _SPARE_BYTES:
        raise BackupFailed(
            f"{where} has {free / 1e6:.0f} MB free, and {(wanted + _SPARE_BYTES) / 1e6:.0f} MB are needed."
        )


def back_up(server: EmbeddedPostgres, folder: Path) -> dict[str, Any]:
    """Back up a running server into `folder`, verify what was written, and return the manifest.

    Conflict when the folder is not empty, BackupFailed when the disk is too small or PostgreSQL's
    programs say so; `folder` is not there then.
    """
    state = PostgresState.read(server.state_file)
    if state is None or not server.is_running():
        raise BackupFailed("The embedded database does not run: there is nothing to back up.")
    environment = state.superuser_environment(server.socket_directory(state))
    require_space(folder, tree_bytes(server.data))
    with new_folder(folder) as partial:
        data = partial / "data"
        options = ["--pgdata", data, "--format", "plain", "--wal-method", "stream", "--checkpoint", "fast"]
        options += ["--manifest-checksums", "SHA256", "--label", "derm-cds", "--no-password"]
        run("pg_basebackup", *options, environment=environment)
        run("pg_verifybackup", *_VERIFY, data)
        return write_manifest(
            partial,
            "database",
            postgres_version=run("postgres", "--version").split()[-1],
            schema=_schema(environment),
            bytes=tree_bytes(data),
            backup_manifest_sha256=digest(data / "backup_manifest"),
        )


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
    options = [*_QUIET, "--tuples-only", "--no-align", "--dbname", DATABASE]
    known = run("psql", *options, "-c", "SELECT to_regclass('schema_migrations')", environment=environment)
    return run("psql", *options, "-c", _SCHEMA, environment=environment) if known else ""


def restore(server: EmbeddedPostgres, folder: Path) -> Path | None:
    """Put the backup in `folder` in the place of the server's data directory; return where that is kept, if there was one.

    Conflict while the service or its database runs; IntegrityError or BackupFailed when the backup
    is damaged, or made by a newer version. Nothing has changed then.
    """
    manifest = read_manifest(folder, "database")
    backup = folder / "data"
    verify_file(backup / "backup_manifest", manifest["backup_manifest_sha256"])
    _refuse_newer(manifest)
    with out_of_service(server.home), server.alone() as state:
        if server.is_running():
            raise Conflict("The database runs here: `derm-cds stop` first.")
        require_space(server.directory, tree_bytes(backup))
        server.lay_out()
        with _workplace(server) as place:
            fresh = place / "data"
            shutil.copytree(backup, fresh, symlinks=True)
            _hand_over(server, place)
            run("pg_verifybackup", *_VERIFY, fresh)
            with _apart(server, place) as at:
                # Every table and index is read, and each index held against its table.
                run("pg_amcheck", "--install-missing", "--heapallindexed", DATABASE, environment=at)
                run("psql", *_QUIET, "-c", "DROP EXTENSION amcheck", environment=at)
                owner = {**state.superuser_environment(None), **at}
                for script in ("postgres_roles.sql", "restore_roles.sql"):
                    run("psql", *_QUIET, "--file", HERE / script, environment=owner)
            server.run("initdb", "--sync-only", "-D", fresh)
            kept = _put_in_place(server, fresh)
        state.ready = True
        state.write(server.state_file)
    return kept


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
    """Make everything in it the server account's; a link, which no backup of ours has, is refused."""
    for path in (place, *place.rglob("*")):
        if path.is_symlink():
            raise IntegrityError(f"{path.name} in the backup is a link: it was not made by this service.")
        if server.account.switch:
            os.chown(path, server.account.uid, server.account.gid)
        path.chmod(0o700 if path.is_dir() else 0o600)


@contextmanager
def _apart(server: EmbeddedPostgres, place: Path) -> Iterator[dict[str, str]]:
    """Run a server on the copy, for this user alone; yields the environment that finds it."""
    with tempfile.TemporaryDirectory(prefix="derm-restore-") as folder:
        sockets = Path(folder)  # in the home its path may be too long for a socket
        server.account.own(sockets, 0o700)
        _configure(server, place, sockets)
        at = place.relative_to(server.directory)  # pg_ctl builds a shell command, see EmbeddedPostgres
        where = ("-D", at / "data")
        options = ("-l", at / "log", "-o", f"-c config_file={at}/postgresql.conf", "-w", "-t", _TIMEOUT_S)
        try:
            server.run("pg_ctl", "start", *where, *options)
        except Exception as error:
            log = place / "log"
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            raise BackupFailed(f"The backup does not start.\n{said}") from error
        try:
            yield {"PGHOST": str(sockets), "PGPORT": str(_PORT), "PGUSER": SUPERUSER, "PGDATABASE": DATABASE}
        finally:
            server.run("pg_ctl", "stop", *where, "-m", "fast", "-w", "-t", _TIMEOUT_S)


def _configure(server: EmbeddedPostgres, place: Path, sockets: Path) -> None:
    settings = configuration(data=place / "data", hba=place / "pg_hba.conf", socket=sockets, port=_PORT)
    ident = str(place / "pg_ident.conf").replace("'", "''")
    user = pwd.getpwuid(os.geteuid()).pw_name
    written = {
        "postgresql.conf": f"{settings}\nlisten_addresses = ''\nident_file = '{ident}'\n",
        "pg_hba.conf": "local all all peer map=restore\n",
        "pg_ident.conf": f'restore "{user}" {SUPERUSER}\n',
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

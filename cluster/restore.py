"""Restoring the embedded database: checked as files, started apart and checked as a database, then put in place.

The server that checks it listens on a socket of its own, which only this user may open (peer
authentication, no port). There the roles also get this home's passwords: a backup of another
machine's has others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
import os
from pathlib import Path
import pwd
import secrets
import shutil
import tempfile
from typing import Any

from cluster.backup import run, verify
from cluster.backup_folder import BackupFailed, read_manifest, require_space, tree_bytes, verify_file
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_state import DATABASE, SUPERUSER, PostgresState
from cluster.running import AlreadyRunning, occupy
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.records.migrate import MIGRATIONS, read_migrations

_HERE = Path(__file__).parent
_PORT = 5432  # names the socket's file; nothing listens on it
_TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Restored:
    """What was restored: the backup's manifest, and where the data directory that was there before is now."""

    manifest: dict[str, Any]
    kept: Path | None


def restore(server: EmbeddedPostgres, folder: Path) -> Restored:
    """Put the backup in `folder` in the place of the server's data directory, which is kept beside it.

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
            verify(fresh)
            with _apart(server, place) as environment:
                _check(environment)
                _set_roles({**state.superuser_environment(None), **environment})
            server.run("initdb", "--sync-only", "-D", fresh)
            kept = _put_in_place(server, fresh)
        _remember(server, state)
    return Restored(manifest, kept)


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
    known = {migration.name for migration in read_migrations(MIGRATIONS)}
    if manifest["schema"] and manifest["schema"] not in known:
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
    values = {"data": place / "data", "hba": place / "pg_hba.conf", "socket": sockets, "port": _PORT}
    settings = (_HERE / "postgresql.conf").read_text()
    for name, value in values.items():
        settings = settings.replace(f"@{name}@", str(value).replace("'", "''"))
    ident = str(place / "pg_ident.conf").replace("'", "''")
    settings += f"\nlisten_addresses = ''\nident_file = '{ident}'\n"
    user = pwd.getpwuid(os.geteuid()).pw_name
    written = {
        "postgresql.conf": settings,
        "pg_hba.conf": "local all all peer map=restore\n",
        "pg_ident.conf": f'restore "{user}" {SUPERUSER}\n',
    }
    for name, text in written.items():
        (place / name).write_text(text)
        os.chown(place / name, server.account.uid, server.account.gid)


def _check(environment: dict[str, str]) -> None:
    """Have amcheck read every table and index, and hold each index against its table."""
    run("pg_amcheck", "--install-missing", "--heapallindexed", DATABASE, environment=environment)
    run("psql", "--no-psqlrc", "--quiet", "-c", "DROP EXTENSION amcheck", environment=environment)


def _set_roles(environment: dict[str, str]) -> None:
    for script in ("postgres_roles.sql", "restore_roles.sql"):
        run("psql", "--no-psqlrc", "--quiet", "--file", _HERE / script, environment=environment)


def _put_in_place(server: EmbeddedPostgres, fresh: Path) -> Path | None:
    kept = None
    if server.data.exists():
        kept = server.data.with_name(f"data.before-{datetime.now(UTC):%Y%m%dT%H%M%S}")
        server.data.rename(kept)
    fresh.rename(server.data)
    for folder in (server.directory, fresh.parent):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
    return kept


def _remember(server: EmbeddedPostgres, state: PostgresState) -> None:
    state.ready = True
    state.write(server.state_file)

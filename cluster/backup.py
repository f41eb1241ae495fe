"""Backing up the embedded database while it serves: a base backup with the log that makes it consistent.

    FOLDER/manifest.json   ours: when, which versions and schema, the digest of PostgreSQL's own manifest
    FOLDER/data/           the data directory, with backup_manifest: the SHA-256 of every file

Neither the key store nor a key-encryption key is in it: alone, it opens no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
import subprocess
from typing import Any

from cluster.backup_folder import (
    BackupFailed,
    digest,
    new_folder,
    require_space,
    tree_bytes,
    write_manifest,
)
from cluster.postgres import EmbeddedPostgres
from cluster.postgres_account import programs
from cluster.postgres_state import DATABASE, PostgresState

_SCHEMA = "SELECT name FROM schema_migrations ORDER BY version DESC LIMIT 1"


def back_up(server: EmbeddedPostgres, folder: Path, *, service_version: str) -> dict[str, Any]:
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
        verify(data)
        return write_manifest(
            partial,
            "database",
            service_version=service_version,
            postgres_version=run("postgres", "--version").split()[-1],
            schema=_schema(environment),
            bytes=tree_bytes(data),
            backup_manifest_sha256=digest(data / "backup_manifest"),
        )


def verify(data: Path) -> None:
    """Hold every file against `backup_manifest`, and read the log through. BackupFailed when anything differs."""
    run("pg_verifybackup", "--exit-on-error", "--quiet", data)


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
    options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--dbname", DATABASE]
    known = run("psql", *options, "-c", "SELECT to_regclass('schema_migrations')", environment=environment)
    return run("psql", *options, "-c", _SCHEMA, environment=environment) if known else ""

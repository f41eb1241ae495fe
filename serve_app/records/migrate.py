"""Brings a database's schema up to what this code needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
import re

import asyncpg

from serve_app.domain.errors import DermError
from serve_app.records.pool import UNAVAILABLE, border, queries

MIGRATIONS = Path(__file__).parent / "migrations"

#: The files up to this version are a squash of the first builds' steps, of which there was one for each version.
BASELINE = 14

_FILE = re.compile(r"(\d{4})_\w+\.sql")
_SQL = queries("migrations")


class SchemaMismatch(DermError):
    """This version of the service cannot work with the database's schema."""

    code = "schema_mismatch"


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: its version, its name without `.sql`, its text and that text's SHA-256."""

    version: int
    name: str
    sql: str
    sha256: bytes


async def migrate(dsn: str, *, application_role: str | None, directory: Path = MIGRATIONS) -> list[str]:
    """Apply what is pending, each migration in a transaction of its own; return the names.

    Any number may start this at once: one works, the others wait. `dsn` is of the role that owns the schema;
    `application_role` gets what serving needs and no more (None: serving runs as the owner). SchemaMismatch when an
    applied file has changed, is missing here (the database is newer than the code), was passed over, or fails, and when
    the database is older than the baseline.
    """
    available = read_migrations(directory)
    async with _connection(dsn) as connection:
        await connection.execute(_SQL["lock"])
        missing = await _pending(connection, available)
        await connection.execute(_SQL["make_ledger"])
        for migration in missing:
            await _apply(connection, migration)
        if application_role is not None:
            await _grant(connection, application_role)
    return [migration.name for migration in missing]


async def pending(dsn: str, *, directory: Path = MIGRATIONS) -> list[str]:
    """Name the migrations that `migrate` would apply; SchemaMismatch as there."""
    available = read_migrations(directory)
    async with _connection(dsn) as connection:
        return [migration.name for migration in await _pending(connection, available)]


@asynccontextmanager
async def _connection(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    with border():
        connection = await asyncpg.connect(dsn, timeout=10)
        try:
            yield connection
        finally:
            await connection.close()


def read_migrations(directory: Path) -> list[Migration]:
    """Read `NNNN_name.sql`, in order; SchemaMismatch when two have one number or a name is no such name."""
    found: list[Migration] = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        content = path.read_bytes()
        if match is None or any(int(match[1]) == earlier.version for earlier in found):
            raise SchemaMismatch(f"{path.name} is not a migration of its own number.")
        found.append(Migration(int(match[1]), path.stem, content.decode(), sha256(content).digest()))
    return found


async def _grant(connection: asyncpg.Connection, application_role: str) -> None:
    found = await connection.fetchrow(_SQL["find_role"], application_role)
    if found is None:
        raise SchemaMismatch(f"There is no role {application_role} to serve as.")
    if found["migrates"]:  # an operator's database of one role: taking rights away would lock it out
        return
    async with connection.transaction():
        await connection.execute(_SQL["grant"].format(role=found["role"]))


async def _apply(connection: asyncpg.Connection, migration: Migration) -> None:
    try:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(_SQL["record"], migration.version, migration.name, migration.sha256)
    except asyncpg.PostgresError as error:
        if isinstance(error, UNAVAILABLE):
            raise
        raise SchemaMismatch(f"{migration.name} cannot be applied: {error}") from error


async def _pending(connection: asyncpg.Connection, available: list[Migration]) -> list[Migration]:
    applied = await connection.fetch(_SQL["applied"]) if await connection.fetchval(_SQL["has_ledger"]) else []
    done = {row["version"] for row in applied}
    if 1 in done:  # made step by step, by files that are gone
        if not done.issuperset(range(1, BASELINE + 1)):
            raise SchemaMismatch(
                f"The database is at {applied[-1]['name']}, and this version begins at {BASELINE:04}: start it once with "
                "an earlier build, which brings it there, and then with this one."
            )
        applied = [row for row in applied if row["version"] > BASELINE]
    known = {migration.version: migration for migration in available}
    for row in applied:
        migration = known.get(row["version"])
        if migration is None:
            raise SchemaMismatch(f"The database has {row['name']}, which this version does not know.")
        if migration.sha256 != row["sha256"]:
            raise SchemaMismatch(f"{migration.name} has changed since it was applied.")
    missing = [migration for migration in available if migration.version not in done]
    if missing and missing[0].version < max(done, default=0):
        raise SchemaMismatch(f"{missing[0].name} was passed over: the database is already past it.")
    return missing

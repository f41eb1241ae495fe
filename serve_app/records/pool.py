"""Connections to PostgreSQL, and the one place where its errors become ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import cache
import json
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
from pgvector.asyncpg import register_vector
from pydantic import TypeAdapter

from serve_app.domain.errors import Conflict, InvalidField, RecordsUnavailable
from serve_app.sql import parse

#: The server or the way to it is at fault, and a later try may succeed.
UNAVAILABLE = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.PostgresSystemError,
    asyncpg.TransactionRollbackError,
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,
)


@contextmanager
def border() -> Iterator[None]:
    """Turn what PostgreSQL and asyncpg raise into domain errors.

    RecordsUnavailable: not reached, not in time, no connection free, or shutting down; whether a write was committed
    is then not known. Conflict: a constraint refuses it. InvalidField: no database text can hold it (NUL, lone
    surrogates). The latter two drop their cause, which quotes rows, and those are patients' data.
    """
    try:
        yield
    except asyncpg.DataError:
        raise InvalidField("A value cannot be stored.") from None
    except asyncpg.IntegrityConstraintViolationError as error:
        raise Conflict(f"This conflicts with what is stored ({error.constraint_name}).") from None
    except UNAVAILABLE as error:
        if isinstance(error, ValueError):  # asyncpg's own DataError: the value never left the client
            raise InvalidField("A value cannot be stored.") from None
        raise RecordsUnavailable("The clinical record did not answer; try again.") from error


_Row = TypeVar("_Row")
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)


def from_row(kind: type[_Row], row: asyncpg.Record | Mapping[str, Any]) -> _Row:
    """Make one of a row whose columns are named like its fields; what is JSON or an enumeration's word there is read."""
    made: _Row = _adapter(kind).validate_python(dict(row))
    return made


class Pool:
    """A bounded set of connections; each call takes one for one statement.

    Belongs to the event loop that opened it. Connections the server has dropped are replaced at
    the next call. Nothing waits longer than the timeout: not for a connection, not for an answer.
    """

    def __init__(self, pool: asyncpg.Pool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Take a connection for several statements; errors come out as domain errors."""
        with border():
            async with self._pool.acquire(timeout=self._timeout_s) as connection:
                try:
                    yield connection
                except UNAVAILABLE:
                    # Nobody knows what state it is in: the next call gets a new one.
                    connection.terminate()
                    raise

    async def fetch(self, query: str, *args: object) -> list[asyncpg.Record]:
        """Run one statement and return its rows."""
        async with self.connection() as connection:
            rows: list[asyncpg.Record] = await connection.fetch(query, *args)
            return rows

    async def fetchrow(self, query: str, *args: object) -> asyncpg.Record | None:
        """Run one statement and return its first row."""
        async with self.connection() as connection:
            return await connection.fetchrow(query, *args)

    async def find(self, kind: type[_Row], query: str, *args: object) -> _Row | None:
        """Run one statement and make one of its first row; None without a row."""
        row = await self.fetchrow(query, *args)
        return None if row is None else from_row(kind, row)

    async def find_all(self, kind: type[_Row], query: str, *args: object) -> list[_Row]:
        """Run one statement and make one of each of its rows."""
        return [from_row(kind, row) for row in await self.fetch(query, *args)]

    async def fetchval(self, query: str, *args: object) -> Any:  # noqa: ANN401
        """Run one statement and return the first value of its first row."""
        async with self.connection() as connection:
            return await connection.fetchval(query, *args)

    async def execute(self, query: str, *args: object) -> None:
        """Run one statement."""
        async with self.connection() as connection:
            await connection.execute(query, *args)

    async def close(self) -> None:
        """Close once all calls are done; after the timeout, close what is left by force."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()


class Store:
    """What is read and written over a pool; RecordsUnavailable as that says."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool


async def open_pool(dsn: str, *, minimum: int = 1, maximum: int = 4, timeout_s: float = 5.0) -> Pool:
    """Connect; RecordsUnavailable when the server cannot be reached (`minimum` 0 connects at first use)."""
    milliseconds = str(int(timeout_s * 1000))
    with border():
        pool = await asyncpg.create_pool(
            dsn,
            min_size=minimum,
            max_size=maximum,
            timeout=timeout_s,
            command_timeout=timeout_s,
            # A new connection costs 20 ms: password, types, statements to prepare.
            max_inactive_connection_lifetime=0,
            max_queries=10_000_000,
            init=_set_up,
            # Statements leave nothing behind in a session: asyncpg's reset would be a round trip each.
            reset=_leave,
            server_settings={
                "application_name": "derm-cds",
                "statement_timeout": milliseconds,
                "lock_timeout": milliseconds,
                "idle_in_transaction_session_timeout": milliseconds,
            },
        )
    return Pool(pool, timeout_s)


async def _set_up(connection: asyncpg.Connection) -> None:
    await register_vector(connection)
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=to_json, decoder=json.loads, format="text"
    )


def to_json(value: object) -> str:
    """Write a jsonb. NaN and infinity are not JSON: ValueError, for whoever computed them should hear of it here."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


async def _leave(_connection: asyncpg.Connection) -> None:
    """Leave the session as it is."""


_QUERIES = Path(__file__).parent / "queries"
#: Statements of lesions.sql that others are made of.
_SHARED = (
    *("record_event", "recorded_image", "recorded_review", "recorded_outcome", "recorded_link", "follow_ups"),
    "classified_image",
)


@cache
def queries(file: str) -> Mapping[str, str]:
    """Read `queries/<file>.sql`: each query stands below its `-- name:` and a line that says what it does.

    `:record_event`, `:recorded_image` and such stand for the statements of these names in lesions.sql.
    """
    text, shared = (_QUERIES / f"{file}.sql").read_text(), parse((_QUERIES / "lesions.sql").read_text())
    for name in _SHARED:
        text = text.replace(f":{name}", shared[name])
    return parse(text)

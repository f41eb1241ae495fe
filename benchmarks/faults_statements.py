"""The n-th statement that goes wrong: the connection is lost before it, or right after it was done."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg

from serve_app.records.pool import Pool

Loss = Literal["before", "after"]
_STATEMENTS = frozenset({"fetch", "fetchrow", "fetchval", "execute", "executemany"})


class FaultyConnections:
    """Stands in for a pool's connections, counts their statements, and cuts the one that it was armed for.

    `before`: the statement never reaches the server. `after`: the server has done and committed it,
    and the answer is lost with the connection, which is really closed both times.
    """

    def __init__(self, pool: Pool) -> None:
        self._connections = pool._pool  # noqa: SLF001 - beneath everything the service does with it
        pool._pool = self  # noqa: SLF001
        self.seen = 0
        self._armed: tuple[int, Loss] | None = None

    def arm(self, n: int, loss: Loss) -> None:
        """Cut the n-th statement from now on, counted from 1."""
        self.seen, self._armed = 0, (n, loss)

    @property
    def is_armed(self) -> bool:
        """Whether the armed statement has not come yet."""
        return self._armed is not None

    def disarm(self) -> None:
        """Let everything through again."""
        self._armed = None

    @asynccontextmanager
    async def acquire(self, *, timeout: float) -> AsyncIterator[Any]:  # noqa: ASYNC109 - asyncpg's own word
        """Take a connection whose statements are counted."""
        async with self._connections.acquire(timeout=timeout) as connection:
            yield _Counted(connection, self)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._connections, name)

    def is_due(self) -> Loss | None:
        """Count one statement; how it is to be lost, if it is the one."""
        self.seen += 1
        if self._armed is None or self.seen != self._armed[0]:
            return None
        loss = self._armed[1]
        self._armed = None
        return loss


class _Counted:
    """A connection that asks before and after each statement whether it is to be lost."""

    def __init__(self, connection: asyncpg.Connection, faults: FaultyConnections) -> None:
        self._connection, self._faults = connection, faults

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        real = getattr(self._connection, name)
        if name not in _STATEMENTS:
            return real

        async def run(*args: object, **options: object) -> object:
            loss = self._faults.is_due()
            if loss == "before":
                self._lose()
            result: object = await real(*args, **options)
            if loss == "after":
                self._lose()
            return result

        return run

    def _lose(self) -> None:
        self._connection.terminate()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

"""A database for the length of a block."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve_app.records.pool import Pool, open_pool


@asynccontextmanager
async def connected(dsn: str, *, maximum: int = 2) -> AsyncIterator[Pool]:
    """A pool of connections, which waits longer than the service does: the machine may be busy with other tests."""
    pool = await open_pool(dsn, minimum=0, maximum=maximum, timeout_s=20)
    try:
        yield pool
    finally:
        await pool.close()

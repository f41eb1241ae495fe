"""What the database has to say of a restored key store: whose keys it must not bring back, and that it is its own."""

from __future__ import annotations

from pathlib import Path

from serve_app.keys.keystore import DestroyedKey
from serve_app.records.pool import open_pool
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())


async def read_erased(dsn: str) -> list[DestroyedKey]:
    """Read every erasure that the database knows of. RecordsUnavailable as the pool says."""
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        if not await pool.fetchval(_SQL["known"], "erasures"):
            return []
        return [DestroyedKey(**row) for row in await pool.fetch(_SQL["erased"])]
    finally:
        await pool.close()


async def release_key_store(dsn: str) -> None:
    """Have the database belong to whichever key store it is started with next, if that knows its images' keys."""
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        if await pool.fetchval(_SQL["known"], "key_stores"):
            await pool.execute(_SQL["release"])
    finally:
        await pool.close()

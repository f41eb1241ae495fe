"""The data keys that a restored key store must not bring back: those of erased images."""

from __future__ import annotations

from pathlib import Path

from serve_app.records.pool import open_pool
from serve_app.records.sql import parse
from serve_app.security.keystore import DestroyedKey

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())


async def read_erased(dsn: str) -> list[DestroyedKey]:
    """Read every erasure that the database knows of. RecordsUnavailable as the pool says."""
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        if not await pool.fetchval(_SQL["known"]):
            return []
        return [DestroyedKey(**row) for row in await pool.fetch(_SQL["erased"])]
    finally:
        await pool.close()

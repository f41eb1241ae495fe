"""The pictures of reference images, and what must be said beside them."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.records.pool import Pool
from serve_app.records.sql import queries

_SQL = queries("reference_cache")


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """What the cache holds of one reference image; `jpeg` and `sha256` (hex) None where only its vector is there."""

    jpeg: bytes | None
    sha256: str | None
    copyright_license: str
    attribution: str


async def find_picture(pool: Pool, isic_id: str) -> CachedPicture | None:
    """Look a reference image up; None when no reference has this id."""
    row = await pool.fetchrow(_SQL["picture"], isic_id)
    return CachedPicture(**row) if row else None

"""What is left lying about: idempotency keys nobody repeats, data keys whose image never came."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from serve_app.records.pool import Pool
from serve_app.records.sql import queries

_SQL = queries("housekeeping")


class Housekeeping:
    """Finds what can go, and lets go of it; RecordsUnavailable as the pool says. For any number at once."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def expire_idempotency_keys(self, *, older_than_s: float, limit: int = 1000) -> int:
        """Delete idempotency keys of this age, but for pending assessments'; returns how many."""
        expired = await self._pool.fetch(
            _SQL["expire_idempotency_keys"], timedelta(seconds=older_than_s), limit
        )
        return len(expired)

    async def orphaned(self, data_key_ids: Sequence[UUID]) -> list[UUID]:
        """Say which of these data keys have no image now; one may still be on its way."""
        rows = await self._pool.fetch(_SQL["orphaned"], data_key_ids)
        return [row["data_key_id"] for row in rows]

    async def condemn(self, data_key_ids: Sequence[UUID]) -> list[UUID]:
        """Have no image come in any more for those of these keys that have none; returns them, to be shredded.

        However late an upload is, whichever of the two commits first is seen by the other one: an image
        that is in keeps its key, and an image of a condemned key is refused (RecordsUnavailable to its caller).
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_SQL["let_no_image_in"])
            rows = await connection.fetch(_SQL["orphaned"], data_key_ids)
            orphaned = [row["data_key_id"] for row in rows]
            await connection.execute(_SQL["condemn"], orphaned)
            return orphaned

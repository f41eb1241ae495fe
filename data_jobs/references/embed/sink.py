"""The end of the pipeline: rows into one space of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
from pydantic import SecretStr
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor

from data_jobs.references.embed.steps import IMAGE_COLUMNS
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import RecordsUnavailable
from serve_app.records.pool import open_pool
from serve_app.records.reference_cache import FailedReference, ReferenceCache, ReferencePicture
from serve_app.records.references import DIMENSIONS, ReferenceImage

#: How long a write goes on trying when the database is away: a restart of it, not an outage of a day.
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class _Arrivals:
    images: list[ReferenceImage]
    embeddings: np.ndarray[Any, np.dtype[np.float32]]
    pictures: list[ReferencePicture]
    failures: list[FailedReference]


class ReferenceSink(Datasink[None]):
    """Writes each bundle of blocks in one transaction. Ray may write one twice; twice is as good as once.

    The only part of the pipeline that knows where the database is, and shows it in no text of itself.
    """

    def __init__(self, dsn: str, embedding_space: str, *, rows_per_write: int) -> None:
        self._dsn = SecretStr(dsn)
        self._embedding_space = embedding_space
        self._rows_per_write = rows_per_write

    @property
    def supports_distributed_writes(self) -> bool:
        """No: where the driver runs the database is known to be reachable; elsewhere a local socket is not."""
        return False

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray collects for one transaction."""
        return self._rows_per_write

    def write(self, blocks: Iterable[Block], ctx: object) -> None:  # noqa: ARG002 - Ray's signature
        """Take in all rows of these blocks, or none. RecordsUnavailable when the database stays away."""
        rows = [row for block in blocks for row in BlockAccessor.for_block(block).to_arrow().to_pylist()]
        if rows:
            asyncio.run(self._take_in(_arrivals(rows)))

    async def _take_in(self, arrivals: _Arrivals) -> None:
        started, pause = monotonic(), 0.5
        while True:
            try:
                await self._try(arrivals)
            except RecordsUnavailable:
                if monotonic() - started > PATIENCE_S:
                    raise
                await asyncio.sleep(pause)
                pause = min(2.0 * pause, 10.0)
            else:
                return

    async def _try(self, arrivals: _Arrivals) -> None:
        pool = await open_pool(self._dsn.get_secret_value(), minimum=0, maximum=1, timeout_s=60)
        try:
            await ReferenceCache(pool).take_in(
                self._embedding_space,
                arrivals.images,
                arrivals.embeddings,
                pictures=arrivals.pictures,
                failures=arrivals.failures,
            )
        finally:
            await pool.close()


def _arrivals(rows: list[dict[str, Any]]) -> _Arrivals:
    good = [row for row in rows if row["cause"] is None]
    flat = np.frombuffer(b"".join(row["embedding"] for row in good), np.float32)
    return _Arrivals(
        images=[_image(row) for row in good],
        embeddings=flat.reshape(len(good), DIMENSIONS),
        pictures=[
            ReferencePicture(row["isic_id"], row["width"], row["height"], row["jpeg_sha256"], row["jpeg"])
            for row in good
            if row["jpeg"] is not None
        ],
        failures=[
            FailedReference(row["isic_id"], row["cause"], row["detail"])
            for row in rows
            if row["cause"] is not None
        ],
    )


def _image(row: dict[str, Any]) -> ReferenceImage:
    values = {name: row[name] for name in IMAGE_COLUMNS}
    return ReferenceImage(**{**values, "diagnosis": Diagnosis(row["diagnosis"])})

"""The job as Ray Data runs it: catalogue rows -> actors that read, prepare and embed -> database.

On CPUs the actors prepare their own images, so that names travel and pixels do not: a step of its own for it
costs a fifth of the rate. Where decoding would hold a GPU up, preparing is one (`Resources.prepare_cpus`).
Where the job runs and how wide is said by `Resources` alone: two cores of one machine, GPUs of many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import SecretStr
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasink, TaskPoolStrategy
from ray.data.block import Block, BlockAccessor
import tenacity

from data_jobs.references.embed.resources import Resources
from data_jobs.references.embed.steps import IMAGE_COLUMNS, EmbedImages, PrepareImages, embed_files
from deployments.preprocess.pixels import InputGeometry
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

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(RecordsUnavailable),
        stop=tenacity.stop_after_delay(PATIENCE_S),
        wait=tenacity.wait_exponential(multiplier=0.5, max=10.0),
        reraise=True,
    )
    async def _take_in(self, arrivals: _Arrivals) -> None:
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


#: Every actor gets so many blocks at least, of so many rows at least: all are at work, and end at much the same time.
_BLOCKS_AN_ACTOR = 4
_LEAST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Target:
    """Which model embeds, into which space. The models lie at that path on every node.

    Where the database is stands elsewhere: every actor gets this, and Ray Data writes the fields of a
    dataclass into its records of a run.
    """

    models: Path
    model_id: str
    embedding_space: str


def run_pipeline(
    table: pa.Table,
    folder: Path,
    geometry: InputGeometry,
    target: Target,
    dsn: str,
    resources: Resources,
    *,
    pictures: bool,
) -> None:
    """Embed every row of the catalogue `table`; returns when all are in the database `dsn`. Needs `ray.init`."""
    configure_data()
    prepare = PrepareImages(folder, geometry, pictures)
    # Not from_arrow: that looks at each block in a task of a whole CPU, which a node that serves may not have.
    dataset: ray.data.Dataset = ray.data.from_blocks(list(split_rows(table, resources)))
    if resources.prepare_cpus:
        dataset = dataset.map_batches(
            prepare,
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=resources.prepare_tasks),
            num_cpus=resources.prepare_cpus,
        )
    dataset.map_batches(
        _Embedding,
        fn_constructor_args=(target, resources, None if resources.prepare_cpus else prepare),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=resources.actors, max_tasks_in_flight_per_actor=2),
        num_cpus=resources.actor_cpus,
        num_gpus=resources.actor_gpus or None,
    ).write_datasink(
        ReferenceSink(dsn, target.embedding_space, rows_per_write=resources.rows_per_write),
        ray_remote_args={"num_cpus": resources.write_cpus},
        concurrency=1,
    )


def split_rows(table: pa.Table, resources: Resources) -> Iterator[pa.Table]:
    """Cut a table into blocks of one transaction, or smaller where actors would else have nothing to do."""
    share = -(-table.num_rows // (_BLOCKS_AN_ACTOR * resources.actors))
    rows = min(resources.rows_per_write, max(_LEAST_ROWS, share))
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def configure_data() -> None:
    """Set Ray Data up for machines of a few cores, and quiet: the job has a progress display of its own."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 32 * 1024 * 1024


class _Embedding:
    """EmbedImages in an actor, and PrepareImages unless that was done before."""

    def __init__(self, target: Target, resources: Resources, prepare: PrepareImages | None) -> None:
        self._prepare = prepare
        self._embed = EmbedImages(
            target.models,
            target.model_id,
            target.embedding_space,
            threads=resources.threads,
            device=resources.device,
            batch=resources.batch,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._embed(batch) if self._prepare is None else embed_files(batch, self._prepare, self._embed)

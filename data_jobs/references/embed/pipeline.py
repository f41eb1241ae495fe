"""The job as Ray Data runs it: catalogue rows -> actors that read, prepare and embed -> database.

On CPUs the actors prepare their own images, so that names travel and pixels do not: a step of its own for it
costs a fifth of the rate. Where decoding would hold a GPU up, preparing is one (`Resources.prepare_cpus`).
An image that cannot be used travels on as a row with a cause and no pixels: one bad file costs no other anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import pyarrow as pa
from pydantic import SecretStr
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasink, TaskPoolStrategy
from ray.data.block import Block, BlockAccessor
import tenacity

from data_jobs.references.catalogue import CatalogueEntry
from data_jobs.references.embed.resources import Resources
from data_jobs.references.embedder import ReferenceEmbedder, prepare_reference, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import RecordsUnavailable, StageFailed
from serve_app.records.pool import open_pool
from serve_app.records.references import (
    DIMENSIONS,
    FailedReference,
    ReferenceCache,
    ReferenceImage,
    ReferencePicture,
)

#: How long a write goes on trying when the database is away: a restart of it, not an outage of a day.
PATIENCE_S = 120.0
#: So many images have their pixels in memory at a time, where one process prepares and embeds.
_PREPARED_AT_ONCE = 32
#: Every actor gets so many blocks at least, of so many rows at least: all are at work, and end at much the same time.
_BLOCKS_AN_ACTOR = 4
_LEAST_ROWS = 32

#: What a row carries of its image all the way: the catalogue's words, then the picture and what went wrong.
_IMAGE = [
    (field.name, pa.int16() if field.name == "age_approx" else pa.string())
    for field in fields(ReferenceImage)
]
_MADE = [("width", pa.int16()), ("height", pa.int16()), ("sha256", pa.string()), ("jpeg", pa.binary())]
_MADE += [("cause", pa.string()), ("detail", pa.string())]
_CATALOGUE = pa.schema([*_IMAGE, ("path", pa.string()), ("sha256", pa.string())])
_PREPARED = pa.schema([*_IMAGE, *_MADE, ("pixels", pa.binary())])
_EMBEDDED = pa.schema([*_IMAGE, *_MADE, ("embedding", pa.binary())])


@dataclass(frozen=True, slots=True)
class Target:
    """Which model embeds, into which space. The models lie at that path on every node.

    Where the database is stands elsewhere: every actor gets this, and Ray Data writes the fields of a
    dataclass into its records of a run.
    """

    models: Path
    model_id: str
    embedding_space: str


def catalogue_table(entries: list[CatalogueEntry]) -> pa.Table:
    """What the first step reads: the columns of an image, its file's path and SHA-256."""
    return pa.Table.from_pylist([asdict(entry) for entry in entries], schema=_CATALOGUE)


@dataclass(frozen=True, slots=True)
class PrepareImages:
    """Read, decode and resize the files of a catalogue's rows, and make a picture of each if wanted."""

    folder: Path
    geometry: InputGeometry
    pictures: bool

    def __call__(self, batch: pa.Table) -> pa.Table:
        """`path` and `sha256` (the file's) in; pixels (side·side·3 bytes) and a picture, or a cause, out."""
        return pa.Table.from_pylist([self._prepare(row) for row in batch.to_pylist()], schema=_PREPARED)

    def _prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        path, sha256 = self.folder / row["path"], row.pop("sha256")
        found = prepare_reference(path, row["isic_id"], self.geometry, sha256=sha256, picture=self.pictures)
        if isinstance(found, FailedReference):
            return row | asdict(found)
        return row | {"pixels": found.pixels.tobytes()} | (asdict(found.picture) if found.picture else {})


class EmbedImages:
    """Pixels to unit vectors, and files to pixels where `prepare` is given; loads and verifies the model once."""

    def __init__(self, target: Target, resources: Resources, prepare: PrepareImages | None = None) -> None:
        model = ModelStore(target.models).open(target.model_id)
        side = InputGeometry.from_manifest(model.manifest.input).side
        self._shape = (-1, side, side, 3)
        self._prepare = prepare
        self._embedder = ReferenceEmbedder(
            model,
            space_spec(model, target.embedding_space),
            threads=resources.threads,
            device=resources.device,
            batch=resources.batch,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rows with an `embedding` (512 float32 as bytes), null where there is a cause.

        Prepared here, a few at a time: the pixels of a whole batch are never in memory together.
        """
        if self._prepare is None:
            return self._embed_rows(batch)
        parts = [
            batch.slice(start, _PREPARED_AT_ONCE) for start in range(0, batch.num_rows, _PREPARED_AT_ONCE)
        ]
        return pa.concat_tables([self._embed_rows(self._prepare(part)) for part in parts])

    def _embed_rows(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        good = [row for row in rows if row["cause"] is None]
        images = np.frombuffer(b"".join(row["pixels"] for row in good), np.uint8).reshape(self._shape)
        for row, vector in zip(good, self._embed(images), strict=True):
            if isinstance(vector, StageFailed):
                row |= {"cause": vector.code, "detail": str(vector)}
            else:
                row["embedding"] = vector.tobytes()
        return pa.Table.from_pylist(rows, schema=_EMBEDDED)

    def _embed(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32] | StageFailed]:
        try:
            return list(self._embedder.embed(images))
        except StageFailed as failure:
            if len(images) == 1:
                return [failure]
            # One of them has no finite vector: find out which.
            return [self._embed(image[np.newaxis])[0] for image in images]


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
            asyncio.run(self._take_in(rows))

    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(RecordsUnavailable),
        stop=tenacity.stop_after_delay(PATIENCE_S),
        wait=tenacity.wait_exponential(multiplier=0.5, max=10.0),
        reraise=True,
    )
    async def _take_in(self, rows: list[dict[str, Any]]) -> None:
        good = [row | {"diagnosis": Diagnosis(row["diagnosis"])} for row in rows if row["cause"] is None]
        vectors = np.frombuffer(b"".join(row["embedding"] for row in good), np.float32)
        pool = await open_pool(self._dsn.get_secret_value(), minimum=0, maximum=1, timeout_s=60)
        try:
            await ReferenceCache(pool).take_in(
                self._embedding_space,
                [ReferenceImage(**_cells(row, ReferenceImage)) for row in good],
                vectors.reshape(len(good), DIMENSIONS),
                pictures=[ReferencePicture(**_cells(row, ReferencePicture)) for row in good if row["jpeg"]],
                failures=[FailedReference(**_cells(row, FailedReference)) for row in rows if row["cause"]],
            )
        finally:
            await pool.close()


def _cells(row: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    return {field.name: row[field.name] for field in fields(kind)}


def run_pipeline(
    entries: list[CatalogueEntry], prepare: PrepareImages, target: Target, dsn: str, resources: Resources
) -> None:
    """Embed every entry's image; returns when all are in the database `dsn`. Needs `ray.init`."""
    context = DataContext.get_current()
    # The job has a progress display of its own, and runs on machines of a few cores.
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 32 * 1024 * 1024
    # Not from_arrow: that looks at each block in a task of a whole CPU, which a node that serves may not have.
    blocks = list(split_rows(catalogue_table(entries), resources))
    dataset: ray.data.Dataset = ray.data.from_blocks(blocks)
    if resources.prepare_cpus:
        dataset = dataset.map_batches(
            prepare,
            batch_size=None,
            batch_format="pyarrow",
            compute=TaskPoolStrategy(size=resources.prepare_tasks),
            num_cpus=resources.prepare_cpus,
        )
    dataset.map_batches(
        EmbedImages,
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

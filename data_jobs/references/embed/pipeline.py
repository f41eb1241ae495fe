"""The job as Ray Data runs it: catalogue rows -> actors that read, prepare and embed -> database.

On CPUs the actors prepare their own images, so that names travel and pixels do not: a step of its own for it
costs a fifth of the rate. Where decoding would hold a GPU up, preparing is one (`Resources.prepare_cpus`).
Where the job runs and how wide is said by `Resources` alone: two cores of one machine, GPUs of many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

from data_jobs.references.embed.resources import Resources
from data_jobs.references.embed.sink import ReferenceSink
from data_jobs.references.embed.steps import EmbedImages, PrepareImages, embed_files
from deployments.preprocess.resize import InputGeometry

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
        ReferenceSink(
            dsn,
            target.embedding_space,
            rows_per_write=resources.rows_per_write,
        ),
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

"""The job as Ray Data runs it: catalogue rows -> read and prepare -> embed (actors) -> database.

Where it runs and how wide is said by `Resources` alone: two cores of one machine, GPUs of many.
"""

from __future__ import annotations

from dataclasses import dataclass
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from data_jobs.references.embed.sink import ReferenceSink
from data_jobs.references.embed.steps import EmbedImages, PrepareImages
from deployments.preprocess.resize import InputGeometry
from model_store.session import Device


@dataclass(frozen=True, slots=True)
class Resources:
    """What the job takes of the cluster; CPUs are Ray's logical ones, shares allowed.

    Preparing and writing must find room beside the actors: on a node whose CPUs the actors took all of,
    nothing would ever be read.
    """

    actors: int
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0
    threads: int = 1
    batch: int = 1
    prepare_cpus: float = 0.5
    write_cpus: float = 0.25
    rows_per_block: int = 64
    rows_per_write: int = 256
    niceness: int = 10

    @property
    def device(self) -> Device:
        """Where the network runs."""
        return "cuda" if self.actor_gpus else "cpu"

    @property
    def cpus(self) -> float:
        """What must be there for the job to move at all."""
        return self.actors * self.actor_cpus + self.prepare_cpus + self.write_cpus


@dataclass(frozen=True, slots=True)
class Target:
    """Which model embeds, into which space of which database. The models lie at that path on every node."""

    models: Path
    model_id: str
    embedding_space: str
    dsn: str


def run_pipeline(
    table: pa.Table,
    folder: Path,
    geometry: InputGeometry,
    target: Target,
    resources: Resources,
    *,
    pictures: bool,
) -> None:
    """Embed every row of the catalogue `table`; returns when all are in the database. Needs `ray.init`."""
    configure_data()
    rows = resources.rows_per_block
    blocks = [table.slice(start, rows) for start in range(0, table.num_rows, rows)]
    embed = {"threads": resources.threads, "device": resources.device, "batch": resources.batch}
    (
        ray.data.from_arrow(blocks)
        .map_batches(
            _Preparing(PrepareImages(folder, geometry, pictures), resources.niceness).prepare,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.prepare_cpus,
        )
        .map_batches(
            _Embedding,
            fn_constructor_args=(target, resources.niceness, embed),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=resources.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=resources.actor_cpus,
            num_gpus=resources.actor_gpus or None,
        )
        .write_datasink(
            ReferenceSink(target.dsn, target.embedding_space, rows_per_write=resources.rows_per_write),
            ray_remote_args={"num_cpus": resources.write_cpus},
        )
    )


def configure_data() -> None:
    """Set Ray Data up for machines of a few cores, and quiet: the job has a progress display of its own."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Preparing:
    """PrepareImages in a task."""

    images: PrepareImages
    niceness: int

    def prepare(self, batch: pa.Table) -> pa.Table:
        _step_back(self.niceness)
        return self.images(batch)


class _Embedding:
    """EmbedImages in an actor."""

    def __init__(self, target: Target, niceness: int, options: dict[str, Any]) -> None:
        _step_back(niceness)
        self._images = EmbedImages(target.models, target.model_id, target.embedding_space, **options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return self._images(batch)


def _step_back(niceness: int) -> None:
    """Let everything else on this machine go first: batch work must not slow an answer down.

    Workers belong to one job, so none keeps this for another.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < niceness:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)

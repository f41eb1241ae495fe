"""The job as Ray Data runs it: catalogue rows in, and actors that prepare, embed and write.

An actor does all of it, so that neither files nor pixels travel: what they are fed is names, and what they
give back is a word for each image that failed. Where decoding would hold a GPU up, preparing is a step of
its own (`Resources.prepare_cpus`). Where the job runs and how wide is said by `Resources` alone: two cores
of one machine, GPUs of many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
import os
from pathlib import Path

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from data_jobs.references.embed.sink import ReferenceSink
from data_jobs.references.embed.steps import EmbedImages, PrepareImages, embed_files
from deployments.preprocess.resize import InputGeometry
from model_store.session import Device

#: The least rows of a block, at the end of a job.
_LEAST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Resources:
    """What the job takes of the cluster; CPUs are Ray's logical ones, shares allowed.

    `prepare_cpus` 0: the actors prepare their images themselves. Otherwise tasks that take so much each do,
    and must find room beside the actors: on a node whose CPUs those took all of, nothing would ever be read.
    """

    actors: int
    actor_cpus: float = 1.0
    actor_gpus: float = 0.0
    threads: int = 1
    batch: int = 1
    prepare_cpus: float = 0.0
    rows_per_write: int = 256
    niceness: int = 10

    @property
    def device(self) -> Device:
        """Where the network runs."""
        return "cuda" if self.actor_gpus else "cpu"

    @property
    def cpus(self) -> float:
        """What must be there for the job to move at all."""
        return self.actors * self.actor_cpus + self.prepare_cpus


@dataclass(frozen=True, slots=True)
class Target:
    """Which model embeds, into which space of which database. The models lie at that path on every node."""

    models: Path
    model_id: str
    embedding_space: str
    dsn: str


def run_pipeline(
    table: pa.Table,
    prepare: PrepareImages,
    target: Target,
    resources: Resources,
    *,
    note: Callable[[list[str | None]], None],
) -> None:
    """Embed every row of the catalogue `table`; returns when all are in the database. Needs `ray.init`.

    `note` hears of each transaction: for every image of it the cause of its failure, or None.
    """
    configure_data()
    dataset = ray.data.from_arrow(list(split_rows(table, resources)))
    if resources.prepare_cpus:
        dataset = dataset.map_batches(
            _Preparing(prepare, resources.niceness).prepare,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=resources.prepare_cpus,
        )
    written = dataset.map_batches(
        _Embedding,
        fn_constructor_args=(target, resources, None if resources.prepare_cpus else prepare),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=resources.actors, max_tasks_in_flight_per_actor=2),
        num_cpus=resources.actor_cpus,
        num_gpus=resources.actor_gpus or None,
    )
    for causes in written.iter_batches(batch_size=None, batch_format="pyarrow"):
        note(causes["cause"].to_pylist())


def split_rows(table: pa.Table, resources: Resources) -> Iterator[pa.Table]:
    """Cut a table into blocks of `rows_per_write`, ever smaller towards the end: the actors end together.

    Guided self-scheduling (Polychronopoulos and Kuck, IEEE Transactions on Computers, 1987): a block is
    a share of what is left, here half an actor's part of it.
    """
    most, start = resources.rows_per_write, 0
    least = min(_LEAST_ROWS, most)
    while start < table.num_rows:
        share = (table.num_rows - start) // (2 * resources.actors)
        rows = max(least, min(most, share))
        yield table.slice(start, rows)
        start += rows


def configure_data() -> None:
    """Set Ray Data up for machines of a few cores, and quiet: the job has a progress display of its own."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Preparing:
    """PrepareImages in a task."""

    images: PrepareImages
    niceness: int

    def prepare(self, batch: pa.Table) -> pa.Table:
        _step_back(self.niceness)
        return self.images(batch)


class _Embedding:
    """EmbedImages and ReferenceSink in an actor, and PrepareImages unless that was done before."""

    def __init__(self, target: Target, resources: Resources, prepare: PrepareImages | None) -> None:
        _step_back(resources.niceness)
        self._prepare = prepare
        self._embed = EmbedImages(
            target.models,
            target.model_id,
            target.embedding_space,
            threads=resources.threads,
            device=resources.device,
            batch=resources.batch,
        )
        self._sink = ReferenceSink(target.dsn, target.embedding_space)

    def __call__(self, batch: pa.Table) -> pa.Table:
        embedded = embed_files(batch, self._prepare, self._embed) if self._prepare else self._embed(batch)
        self._sink.take_in(embedded)
        return embedded.select(["cause"])


def _step_back(niceness: int) -> None:
    """Let everything else on this machine go first: batch work must not slow an answer down.

    Workers belong to one job, so none keeps this for another.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) < niceness:
        os.setpriority(os.PRIO_PROCESS, 0, niceness)

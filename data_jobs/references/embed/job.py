"""One run of the embed job: what is missing of a catalogue goes into the space, then the space is indexed.

What is in the database is the only memory between runs, so a run may die at any moment: the next one
embeds what is not there yet, and nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TypeVar

from data_jobs.references.catalogue import CatalogueEntry, read_references
from data_jobs.references.embed.pipeline import Resources, Target, run_pipeline
from data_jobs.references.embed.progress import ProgressDisplay, describe
from data_jobs.references.embed.steps import catalogue_table
from data_jobs.references.embedder import identify_embedder, space_spec
from deployments.preprocess.resize import InputGeometry
from model_store.registry import ModelStore
from serve_app.records.pool import open_pool
from serve_app.records.reference_cache import ReferenceCache

_Result = TypeVar("_Result")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a run did: images found there, embedded now, failed by cause; seconds with and without indexing."""

    embedding_space: str
    expected: int
    found: int
    embedded: int
    failures: Mapping[str, int]
    embedding_s: float
    total_s: float


def run_job(folder: Path, target: Target, resources: Resources, *, pictures: bool, say: Say) -> JobReport:
    """Fill the space from a folder of references. Needs `ray.init`, and the owner's role in the database.

    Raises what `read_references`, `ModelStore.open` and `ReferenceCache.begin` do.
    """
    started = monotonic()
    folder = folder.resolve()
    entries = read_references(folder)
    model = ModelStore(target.models).open(target.model_id)
    spec = space_spec(model, target.embedding_space)
    embedder = identify_embedder(model, spec)

    async def begin(cache: ReferenceCache) -> set[str]:
        await cache.begin(embedder, expected=len(entries))
        return await cache.present(target.embedding_space, with_picture=pictures)

    present = _in_database(target.dsn, begin)
    missing = [entry for entry in entries if entry.isic_id not in present]
    found = len(entries) - len(missing)
    say(f"{len(missing):,} images to embed into {target.embedding_space}; {found:,} are there")
    others = len(present) - found
    display = ProgressDisplay(
        lambda: _glance(target, others, pictures=pictures), len(entries), before=found, say=say
    )
    if missing:
        geometry = InputGeometry.from_manifest(model.manifest.input)
        with display:
            run_pipeline(catalogue_table(missing), folder, geometry, target, resources, pictures=pictures)
    embedded_after = monotonic() - started
    say("indexing")
    _in_database(target.dsn, lambda cache: cache.complete(target.embedding_space))
    done, failures = _look(target, entries)
    total_s = monotonic() - started
    say(describe(done, len(entries), embedded_after, failures, before=found))
    embedded = done - found - sum(failures.values())
    return JobReport(target.embedding_space, len(entries), found, embedded, failures, embedded_after, total_s)


def _glance(target: Target, others: int, *, pictures: bool) -> tuple[int, Mapping[str, int]]:
    """How far the job is, by counting: to name 50,000 images takes what embedding ten of them does.

    `others`: images of the space that are not of this folder.
    """

    async def ask(cache: ReferenceCache) -> tuple[int, Mapping[str, int]]:
        count = await cache.count_present(target.embedding_space, with_picture=pictures)
        return count - others, await cache.failures(target.embedding_space)

    embedded, failures = _in_database(target.dsn, ask)
    return embedded + sum(failures.values()), failures


def _look(target: Target, entries: list[CatalogueEntry]) -> tuple[int, Mapping[str, int]]:
    """How many of the entries are in the space or failed, and the failures by cause."""

    async def ask(cache: ReferenceCache) -> tuple[int, Mapping[str, int]]:
        present = await cache.present(target.embedding_space, with_picture=False)
        return sum(entry.isic_id in present for entry in entries), await cache.failures(
            target.embedding_space
        )

    done, failures = _in_database(target.dsn, ask)
    return done + sum(failures.values()), failures


def _in_database(dsn: str, ask: Callable[[ReferenceCache], Awaitable[_Result]]) -> _Result:
    async def run() -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(ReferenceCache(pool))
        finally:
            await pool.close()

    return asyncio.run(run())

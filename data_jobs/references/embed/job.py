"""One run of the embed job: what is missing of a catalogue goes into the space, then the space is indexed.

What is in the database is the only memory between runs, so a run may die at any moment: the next one
embeds what is not there yet, and nothing twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
import threading
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

from data_jobs.references.catalogue import read_references
from data_jobs.references.embed.pipeline import Target, run_pipeline
from data_jobs.references.embed.resources import Resources
from data_jobs.references.embed.steps import catalogue_table
from data_jobs.references.embedder import identify_embedder, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from serve_app.records.pool import open_pool
from serve_app.records.reference_cache import ReferenceCache

_Result = TypeVar("_Result")
Say = Callable[[str], None]
_LOOK_S = 10.0


@dataclass(frozen=True, slots=True)
class JobReport:
    """What a run did with its folder: images found there, embedded now, failed by cause.

    Seconds are without and with indexing. Failures of another folder's images in that space are not this run's.
    """

    embedding_space: str
    expected: int
    found: int
    embedded: int
    failures: Mapping[str, int]
    embedding_s: float
    total_s: float


def run_job(
    folder: Path, target: Target, dsn: str, resources: Resources, *, pictures: bool, say: Say
) -> JobReport:
    """Fill the space from a folder of references. Needs `ray.init`; `dsn` is for the role that owns the schema.

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

    present = _in_database(dsn, begin)
    names = {entry.isic_id for entry in entries}
    missing = [entry for entry in entries if entry.isic_id not in present]
    found = len(entries) - len(missing)
    say(f"{len(missing):,} images to embed into {target.embedding_space}; {found:,} are there")
    if missing:
        geometry = InputGeometry.from_manifest(model.manifest.input)
        others = len(present - names)
        with _progress(
            lambda: _glance(dsn, target.embedding_space, names, others, pictures=pictures),
            len(entries),
            before=found,
        ):
            run_pipeline(
                catalogue_table(missing), folder, geometry, target, dsn, resources, pictures=pictures
            )
    embedded_after = monotonic() - started
    say("indexing")
    _in_database(dsn, lambda cache: cache.complete(target.embedding_space))
    embedded, failures = _in_database(dsn, lambda cache: count_done(cache, target.embedding_space, names))
    total_s = monotonic() - started
    done = embedded + sum(failures.values())
    failed = ", ".join(f"{count} {cause}" for cause, count in failures.items())
    share = 100.0 * done / len(entries) if entries else 100.0
    say(
        f"{done:,} of {len(entries):,} images ({share:.1f} %); {'failed: ' + failed if failed else 'none failed'}"
    )
    return JobReport(
        target.embedding_space, len(entries), found, embedded - found, failures, embedded_after, total_s
    )


@contextmanager
def _progress(
    look: Callable[[], tuple[int, Mapping[str, int]]], total: int, *, before: int
) -> Iterator[None]:
    """Show every few seconds what `look` finds: how many images are done, and the failures by cause.

    When it fails the bar stays as it is for that once: it must never end the job that it shows.
    """
    over = threading.Event()

    def show() -> None:
        while not over.wait(_LOOK_S):
            try:
                bar.n, failures = look()
            except Exception as error:  # noqa: BLE001 - see above
                bar.set_postfix_str(f"progress unknown: {error}")
            else:
                bar.set_postfix(failures)

    with tqdm(total=total, initial=before, unit=" images") as bar:
        thread = threading.Thread(target=show, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


async def count_done(
    cache: ReferenceCache, embedding_space: str, names: set[str]
) -> tuple[int, Mapping[str, int]]:
    """How many of the named images are in the space and have not failed, and the failures of the others by cause."""
    present = await cache.present(embedding_space, with_picture=False)
    failed = await cache.failures(embedding_space)
    return len((present & names) - failed.keys()), _count_causes(failed, names)


def _glance(
    dsn: str, embedding_space: str, names: set[str], others: int, *, pictures: bool
) -> tuple[int, Mapping[str, int]]:
    """How far the job is, by counting: to name 50,000 images takes what embedding ten of them does.

    `others`: images of the space that are not of this folder.
    """

    async def ask(cache: ReferenceCache) -> tuple[int, Mapping[str, str]]:
        return (
            await cache.count_present(embedding_space, with_picture=pictures),
            await cache.failures(embedding_space),
        )

    present, failed = _in_database(dsn, ask)
    failures = _count_causes(failed, names)
    return present - others + sum(failures.values()), failures


def _count_causes(failed: Mapping[str, str], names: set[str]) -> Mapping[str, int]:
    return dict(sorted(Counter(cause for name, cause in failed.items() if name in names).items()))


def _in_database(dsn: str, ask: Callable[[ReferenceCache], Awaitable[_Result]]) -> _Result:
    async def run() -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(ReferenceCache(pool))
        finally:
            await pool.close()

    return asyncio.run(run())

"""The embed job: what is missing of a folder of references goes into the space, then the space is indexed.

What is in the database is the only memory between runs, so a run may die at any moment: the next one
embeds what is not there yet, and nothing twice.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
import json
import os
from pathlib import Path
import sys
import threading
from time import monotonic
from typing import Any, TypeVar

import ray
from tqdm import tqdm

from data_jobs.references import embed
from data_jobs.references.catalogue import read_references
from data_jobs.references.embed.pipeline import PrepareImages, Target, run_pipeline
from data_jobs.references.embed.resources import Resources, check_nodes, fit_in, read_nodes
from data_jobs.references.embedder import identify_embedder, space_spec
from deployments.preprocess.pixels import InputGeometry
from model_store.registry import ModelStore
from serve_app.domain.errors import DermError, StageFailed
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceCache
from serve_app.settings import OWNER_URL, default_home, find_owner_url, model_folder

_Result = TypeVar("_Result")
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_PROGRESS_EVERY_S = 10.0
_started = monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Run the job; 0 when every image is in, 1 when the job could not run, 3 when images failed."""
    parsed = _parser().parse_args(arguments)
    try:
        dsn = find_owner_url(default_home())
        if not dsn:
            raise StageFailed(f"{OWNER_URL} is not set, and no node has written it below {default_home()}.")
        model = ModelStore(parsed.models).open(parsed.model)
        space = space_spec(model, parsed.space).embedding_space
        target = Target(parsed.models.resolve(), parsed.model, space)
        resources = _start_ray(parsed)
        report = run_job(parsed.folder, target, dsn, resources, pictures=parsed.pictures, say=_say)
    except (DermError, OSError, ray.exceptions.RayError) as error:
        sys.stderr.write(f"data_jobs.references.embed: {type(error).__name__}: {error}\n")
        return 1
    finally:
        ray.shutdown()
    print(json.dumps(asdict(report)))
    return 3 if report.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_jobs.references.embed", description=embed.__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="with metadata.parquet and images/")
    add("--model", required=True)
    add("--models", type=Path, default=model_folder(), help="$DERM_MODELS; default: %(default)s")
    add("--space", help="one of the model's embedding spaces (default: its first)")
    add("--actors", type=int, help="default: one a core, or one for each share of a free GPU")
    cpus = "logical CPUs an actor takes (default: 1; on a running cluster, a share of what it has to spare)"
    add("--actor-cpus", type=float, help=cpus)
    add("--actor-gpus", type=float, default=0.0, help="GPUs, or a share of one, an actor takes")
    add("--threads", type=int, default=1, help="cores of one forward pass")
    add("--batch", type=int, default=1, help="images a forward pass; more only on a GPU")
    cpus = "logical CPUs of a task that only prepares; 0: the actors do it (default: 0, with GPUs 1)"
    add("--prepare-cpus", type=float, help=cpus)
    add("--rows-per-write", type=int, default=256, help="images a transaction takes in")
    add("--niceness", type=int, default=10, help="0 to compete with the service as an equal")
    add("--no-pictures", dest="pictures", action="store_false", help="keep vectors only")
    return parser


def _start_ray(parsed: argparse.Namespace) -> Resources:
    """Join the cluster that RAY_ADDRESS names, else start Ray here; returns what the job takes of it."""
    wanted = Resources(
        actors=parsed.actors or os.cpu_count() or 1,
        actor_cpus=1.0 if parsed.actor_cpus is None else parsed.actor_cpus,
        actor_gpus=parsed.actor_gpus,
        threads=parsed.threads,
        batch=parsed.batch,
        # A GPU embeds faster than the core beside it decodes.
        prepare_cpus=float(parsed.actor_gpus > 0) if parsed.prepare_cpus is None else parsed.prepare_cpus,
        rows_per_write=parsed.rows_per_write,
    )
    joins = bool(os.environ.get("RAY_ADDRESS"))
    own: dict[str, Any] = {
        "_node_ip_address": "127.0.0.1",
        "num_cpus": max(os.cpu_count() or 1, 2, int(wanted.cpus) + 1),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    if joins:
        # The driver is busy for as long as the job is.
        os.setpriority(os.PRIO_PROCESS, 0, max(parsed.niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    else:
        # Without a dashboard nobody reads what Ray's agent finds out about every process every five seconds.
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
    # Nice from the start on: what a worker imports takes seconds of a core.
    nice = {"env_vars": {"RAY_worker_niceness": str(parsed.niceness)}}
    try:
        ray.init(log_to_driver=True, runtime_env=nice, **({} if joins else own))
    except Exception as error:  # Ray's have no common base
        raise StageFailed(f"Ray did not start: {error}") from error
    if not joins:
        return wanted
    taken = fit_in(wanted, read_nodes(), actors=parsed.actors, actor_cpus=parsed.actor_cpus)
    check_nodes(parsed.folder, parsed.models)
    _say(f"{taken.actors} actors of {taken.actor_cpus:.2f} logical CPUs each, {taken.cpus:.2f} in all")
    return taken


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
    folder: Path,
    target: Target,
    dsn: str,
    resources: Resources,
    *,
    pictures: bool,
    say: Callable[[str], None],
) -> JobReport:
    """Fill the space from a folder of references. Needs `ray.init`; `dsn` is for the role that owns the schema.

    Raises what `read_references`, `ModelStore.open` and `ReferenceCache.begin` do.
    """
    started, space = monotonic(), target.embedding_space
    entries = read_references(folder)
    model = ModelStore(target.models).open(target.model_id)
    embedder = identify_embedder(model, space_spec(model, space))

    async def begin(cache: ReferenceCache) -> set[str]:
        await cache.begin(embedder, expected=len(entries))
        return await cache.present(space, with_picture=pictures)

    present = _ask_database(dsn, begin)
    missing = [entry for entry in entries if entry.isic_id not in present]
    found = len(entries) - len(missing)
    say(f"{len(missing):,} images to embed into {space}; {found:,} are there")
    names = {entry.isic_id for entry in entries}
    if missing:
        prepare = PrepareImages(folder.resolve(), InputGeometry.from_manifest(model.manifest.input), pictures)
        with _progress(
            lambda: _ask_database(dsn, lambda cache: count_done(cache, space, names, pictures=pictures)),
            len(entries),
            before=found,
        ):
            run_pipeline(missing, prepare, target, dsn, resources)
    embedding_s = monotonic() - started
    say("indexing")
    _ask_database(dsn, lambda cache: cache.complete(space))
    embedded, failures = _ask_database(dsn, lambda cache: count_done(cache, space, names))
    total_s = monotonic() - started
    done = embedded + sum(failures.values())
    failed = ", ".join(f"{count} {cause}" for cause, count in failures.items())
    share = 100.0 * done / len(entries) if entries else 100.0
    say(
        f"{done:,} of {len(entries):,} images ({share:.1f} %); {'failed: ' + failed if failed else 'none failed'}"
    )
    return JobReport(space, len(entries), found, embedded - found, failures, embedding_s, total_s)


@contextmanager
def _progress(
    look: Callable[[], tuple[int, Mapping[str, int]]], total: int, *, before: int
) -> Iterator[None]:
    """Show every few seconds what `look` finds: how many images are embedded, and the failures by cause.

    When it fails the bar stays as it is for that once: it must never end the job that it shows.
    """
    over = threading.Event()

    def show() -> None:
        while not over.wait(_PROGRESS_EVERY_S):
            try:
                embedded, failures = look()
            except Exception as error:  # noqa: BLE001 - see above
                bar.set_postfix_str(f"progress unknown: {error}")
            else:
                bar.n = embedded + sum(failures.values())
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
    cache: ReferenceCache, embedding_space: str, names: set[str], *, pictures: bool = False
) -> tuple[int, Mapping[str, int]]:
    """How many of the named images are in the space and have not failed, and the failures of the others by cause.

    With `pictures` an image is there when its picture is.
    """
    present = await cache.present(embedding_space, with_picture=pictures)
    failed = await cache.failures(embedding_space)
    causes = Counter(cause for name, cause in failed.items() if name in names)
    return len((present & names) - failed.keys()), dict(sorted(causes.items()))


def _ask_database(dsn: str, ask: Callable[[ReferenceCache], Awaitable[_Result]]) -> _Result:
    async def run() -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(ReferenceCache(pool))
        finally:
            await pool.close()

    return asyncio.run(run())


def _say(message: str) -> None:
    sys.stderr.write(f"[{monotonic() - _started:7.1f} s] {message}\n")
    sys.stderr.flush()

"""The command line of the embed job: see `__main__`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
import json
import os
from pathlib import Path
import sys
from time import monotonic
from typing import Any

import ray

from data_jobs.references import embed
from data_jobs.references.embed.job import run_job
from data_jobs.references.embed.pipeline import Target
from data_jobs.references.embed.resources import Resources, check_nodes, fit_in, look_around
from data_jobs.references.embedder import space_spec
from model_store.registry import ModelStore
from serve_app.domain.errors import DermError, StageFailed
from serve_app.settings import OWNER_URL, default_home, find_owner_url, model_folder

_OBJECT_STORE_BYTES = 256 * 1024 * 1024
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
        resources = _join(parsed) if os.environ.get("RAY_ADDRESS") else _start(parsed)
        report = run_job(parsed.folder, target, dsn, resources, pictures=parsed.pictures, say=_say)
    except (DermError, OSError, ray.exceptions.RayError) as error:
        return _fail(f"{type(error).__name__}: {error}")
    finally:
        ray.shutdown()
    print(json.dumps(asdict(report)))
    return 3 if report.failures else 0


def _join(parsed: argparse.Namespace) -> Resources:
    """Join the cluster that RAY_ADDRESS names, and say what of it the job takes."""
    # The driver is busy for as long as the job is.
    os.setpriority(os.PRIO_PROCESS, 0, max(parsed.niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    _init_ray(parsed)
    resources = fit_in(_wanted(parsed), look_around(), actors=parsed.actors, actor_cpus=parsed.actor_cpus)
    check_nodes(parsed.folder, parsed.models)
    _say(
        f"{resources.actors} actors of {resources.actor_cpus:.2f} logical CPUs each, {resources.cpus:.2f} in all"
    )
    return resources


def _start(parsed: argparse.Namespace) -> Resources:
    """Start Ray here, with as many logical CPUs as the job takes."""
    resources = _wanted(parsed)
    # Without a dashboard nobody reads what Ray's agent finds out about every process every five seconds.
    os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
    _init_ray(
        parsed,
        _node_ip_address="127.0.0.1",
        num_cpus=max(os.cpu_count() or 1, 2, int(resources.cpus) + 1),
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
    )
    return resources


def _init_ray(parsed: argparse.Namespace, **here: Any) -> None:  # noqa: ANN401 - Ray's own options
    # From its start on: what a worker imports takes seconds of a core.
    behind = {"env_vars": {"RAY_worker_niceness": str(parsed.niceness)}}
    try:
        ray.init(log_to_driver=True, runtime_env=behind, **here)
    except Exception as error:  # Ray's have no common base
        raise StageFailed(f"Ray did not start: {error}") from error


def _wanted(parsed: argparse.Namespace) -> Resources:
    """What was asked for; where nothing was, what a machine of the job's own has."""
    return Resources(
        actors=parsed.actors or os.cpu_count() or 1,
        actor_cpus=1.0 if parsed.actor_cpus is None else parsed.actor_cpus,
        actor_gpus=parsed.actor_gpus,
        threads=parsed.threads,
        batch=parsed.batch,
        prepare_cpus=_prepare_cpus(parsed),
        rows_per_write=parsed.rows_per_write,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_jobs.references.embed", description=embed.__doc__)
    parser.add_argument("folder", type=Path, help="with metadata.parquet and images/")
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--models", type=Path, default=model_folder(), help="$DERM_MODELS; default: %(default)s"
    )
    parser.add_argument("--space", help="one of the model's embedding spaces (default: its first)")
    parser.add_argument("--actors", type=int, help="default: one a core, or one for each share of a free GPU")
    parser.add_argument(
        "--actor-cpus",
        type=float,
        help="logical CPUs an actor takes (default: 1; on a running cluster, a share of what it has to spare)",
    )
    parser.add_argument(
        "--actor-gpus", type=float, default=0.0, help="GPUs, or a share of one, an actor takes"
    )
    parser.add_argument("--threads", type=int, default=1, help="cores of one forward pass")
    parser.add_argument("--batch", type=int, default=1, help="images a forward pass; more only on a GPU")
    parser.add_argument(
        "--prepare-cpus",
        type=float,
        help="logical CPUs of a task that only prepares; 0: the actors do it (default: 0, with GPUs 1)",
    )
    parser.add_argument("--rows-per-write", type=int, default=256, help="images a transaction takes in")
    parser.add_argument("--niceness", type=int, default=10, help="0 to compete with the service as an equal")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="keep vectors only")
    return parser


def _prepare_cpus(parsed: argparse.Namespace) -> float:
    if parsed.prepare_cpus is not None:
        return float(parsed.prepare_cpus)
    # A GPU embeds faster than the core beside it decodes.
    return 1.0 if parsed.actor_gpus else 0.0


def _say(message: str) -> None:
    sys.stderr.write(f"[{monotonic() - _started:7.1f} s] {message}\n")
    sys.stderr.flush()


def _fail(message: str) -> int:
    sys.stderr.write(f"data_jobs.references.embed: {message}\n")
    return 1

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
from data_jobs.references.embed.pipeline import Resources, Target
from data_jobs.references.embedder import space_spec
from model_store.registry import ModelStore
from serve_app.domain.errors import DermError, StageFailed

DATABASE = "DERM_OWNER_DATABASE_URL"
_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_started = monotonic()


def main(arguments: list[str] | None = None) -> int:
    """Run the job; 0 when every image is in, 1 when the job could not run, 3 when images failed."""
    parsed = _parser().parse_args(arguments)
    dsn = os.environ.get(DATABASE, "")
    if not dsn:
        return _fail(f"{DATABASE} is not set; `derm-cds references embed` sets it for a node's own database.")
    resources = Resources(
        actors=parsed.actors,
        actor_cpus=parsed.actor_cpus,
        actor_gpus=parsed.actor_gpus,
        threads=parsed.threads,
        batch=parsed.batch,
        prepare_cpus=_prepare_cpus(parsed),
        rows_per_write=parsed.rows_per_write,
        niceness=parsed.niceness,
    )
    try:
        model = ModelStore(parsed.models).open(parsed.model)
        space = space_spec(model, parsed.space).embedding_space
        target = Target(parsed.models.resolve(), parsed.model, space, dsn)
        join_ray(resources)
        report = run_job(parsed.folder, target, resources, pictures=parsed.pictures, say=_say)
    except (DermError, OSError, ray.exceptions.RayError) as error:
        return _fail(f"{type(error).__name__}: {error}")
    finally:
        ray.shutdown()
    print(json.dumps(asdict(report)))
    return 3 if report.failures else 0


def join_ray(resources: Resources) -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray here with as many logical CPUs as the job needs.

    Raises StageFailed when there is no cluster to join, or a node does not start in Ray's own time.
    """
    here: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # Without a dashboard nobody reads what Ray's agent finds out about every process every five seconds.
        os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
        here = {
            "_node_ip_address": "127.0.0.1",
            "num_cpus": max(os.cpu_count() or 1, 2, int(resources.cpus) + 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
    try:
        ray.init(log_to_driver=True, **here)
    except Exception as error:  # Ray's have no common base
        raise StageFailed(f"Ray did not start: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_jobs.references.embed", description=embed.__doc__)
    parser.add_argument("folder", type=Path, help="with metadata.parquet and images/")
    parser.add_argument("--model", required=True)
    parser.add_argument("--models", type=Path, default=Path("model_store/models"))
    parser.add_argument("--space", help="one of the model's embedding spaces (default: its first)")
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1, help="default: one a core")
    parser.add_argument("--actor-cpus", type=float, default=1.0, help="logical CPUs an actor takes")
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

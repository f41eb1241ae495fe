"""The two systems under test, started and stopped by the benchmark: the graph and its baseline.

Also the records that they run on, and the memory and processor time that they take. Memory is PSS: a shared page is
counted once, split among its sharers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any
from unittest import mock
import urllib.error
import urllib.request

import psutil

from cluster.node_files import read_service_environment, write_service_environment
from cluster.ports import choose_ports
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.prepare import choose_model
from cluster.ray_node import RayNode
from data_jobs.references.load import publish_bundled
from serve_app.access.tokens import mint_token
from serve_app.audit.events import account_event
from serve_app.records.access import AccessStore, CareAssignment
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import model_folder

CORES = os.cpu_count() or 1
_READY_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class System:
    """A running system: where it answers, and the processes it is made of."""

    name: str
    url: str
    ready_s: float
    postgres: EmbeddedPostgres
    node: RayNode | None = None
    process: subprocess.Popen[bytes] | None = None

    def memory(self) -> dict[str, Any]:
        """PSS of every process of the system, PostgreSQL included."""
        return measure_pss(self._roots())

    def cpu(self) -> dict[str, float]:
        """Processor seconds that each of them has used so far."""
        return measure_cpu(self._roots())

    def _roots(self) -> list[psutil.Process]:
        roots = [psutil.Process(pid) for pid in [self.postgres.pid()] if pid is not None]
        if self.node is not None:
            roots.extend(self.node.processes())
        if self.process is not None:
            roots.append(psutil.Process(self.process.pid))
        return roots


@contextmanager
def running_graph(
    home: Path, *, port: int, dashboard: bool = False, settings: Mapping[str, str] | None = None
) -> Iterator[System]:
    """Start a Ray node and deploy the graph on it, as `derm-cds serve` does.

    `settings` are further DERM_* variables of the node.
    """
    # Beside another node of this machine, if there is one.
    gcs, stats, metrics, board, fallback = choose_ports(5)
    node = RayNode(
        home,
        port=gcs,
        stats_port=stats,
        metrics_port=metrics,
        dashboard=dashboard,
        dashboard_port=board,
        fallback_port=fallback,
    )
    started = time.monotonic()
    try:
        with mock.patch.dict(os.environ, settings or {}):
            node.start()
            command = [sys.executable, "-m", "cluster.deploy", "--address", node.address]
            command += ["--host", "127.0.0.1", "--port", str(port), "--profile", "cpu"]
            subprocess.run(command, env=node.environment, check=True)
        _wait_ready(port)
        ready_s = time.monotonic() - started
        yield System("graph", _url(port), ready_s, EmbeddedPostgres(home), node=node)
    finally:
        node.stop()


@contextmanager
def running_baseline(home: Path, *, port: int, workers: int) -> Iterator[System]:
    """Start uvicorn workers; ONNX Runtime threads × workers = cores."""
    environment = os.environ | {
        "DERM_HOME": str(home),
        "BASELINE_THREADS": str(max(1, CORES // workers)),
        # As Ray sets it for its workers: numpy's own threads would fight ONNX Runtime's.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "uvicorn", "benchmarks.baseline:make_app", "--factory"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
    command += ["--no-access-log", "--log-level", "warning"]
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment)
    try:
        _wait_ready(port)
        ready_s = time.monotonic() - started
        yield System("baseline", _url(port), ready_s, EmbeddedPostgres(home), process=process)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}/api/lesions"


def _wait_ready(port: int) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise TimeoutError(f"Nothing ready on port {port}.")


def prepare_records(home: Path, urls: DatabaseUrls, *, clinician: str, patient: str) -> str:
    """Migrate, load the model's references, make it live, assign the patient; returns a day's token for the clinician."""
    write_service_environment(home, urls)
    models = model_folder()

    async def fill() -> None:
        await migrate(urls.owner, application_role="derm_app")
        await publish_bundled(urls.owner, models, choose_model(models, wanted=None, live=None))
        pool = await open_pool(urls.owner, minimum=0, maximum=1)
        since, event = datetime(2026, 1, 1, tzinfo=UTC), account_event("assign", patient_id=patient)
        await AccessStore(pool).assign(CareAssignment(patient, clinician, since, None), event=event)
        await pool.close()

    asyncio.run(fill())
    return mint_token(
        secret=read_service_environment(home)["DERM_TOKEN_SECRET"],
        issuer="derm-cds",
        audience="derm-cds",
        subject=clinician,
        roles=["clinician"],
        lifetime_s=86_400,
    )


def with_descendants(roots: Iterable[psutil.Process]) -> dict[int, psutil.Process]:
    """Each process and everything below it, by pid."""
    found: dict[int, psutil.Process] = {}
    for root in roots:
        try:
            for process in (root, *root.children(recursive=True)):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            continue
    return found


def measure_pss(roots: Iterable[psutil.Process]) -> dict[str, Any]:
    """Sum the PSS of the processes and their descendants, in MB, with the parts by name."""
    parts: dict[str, float] = {}
    processes = with_descendants(roots)
    for process in processes.values():
        try:
            parts[_name(process)] = process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return {
        "total_mb": round(sum(parts.values()), 1),
        "processes": len(parts),
        "parts_mb": {name: round(mb, 1) for name, mb in sorted(parts.items(), key=lambda part: -part[1])},
    }


def measure_cpu(roots: Iterable[psutil.Process]) -> dict[str, float]:
    """Processor seconds, user and system, that each process has used so far."""
    used: dict[str, float] = {}
    for process in with_descendants(roots).values():
        try:
            times = process.cpu_times()
            used[_name(process)] = times.user + times.system
        except psutil.Error:
            continue
    return used


def _name(process: psutil.Process) -> str:
    command = process.cmdline() or [process.name()]
    name = command[0].strip() or process.name()
    if "python" in name:
        name = " ".join(command)[-60:]
    return f"{name[:60]} {process.pid}"

"""The two systems under test, started and stopped by the benchmark: the graph and its baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
import os
from pathlib import Path
import subprocess
import sys
import time
from typing import Any
import urllib.error
import urllib.request

import psutil

from benchmarks.processes import measure_cpu, measure_pss
from cluster.ports import choose_ports
from cluster.postgres import EmbeddedPostgres
from cluster.ray_node import RayNode

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
    os.environ.update(settings or {})
    # Beside another node of this machine, if there is one.
    ports = choose_ports(5)
    os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(ports[4])
    node = RayNode(
        home,
        port=ports[0],
        stats_port=ports[1],
        metrics_port=ports[2],
        dashboard=dashboard,
        dashboard_port=ports[3],
    )
    started = time.monotonic()
    try:
        node.start()
        command = [sys.executable, "-m", "cluster.deploy", "--address", node.address, "--host", "127.0.0.1"]
        subprocess.run([*command, "--port", str(port), "--profile", "cpu"], env=node.environment, check=True)
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

"""One Ray head node, with nothing that the service does not need; stopped without touching another.

`ray stop` ends every Ray process of the machine. Ours carry a mark in their environment,
which all their children inherit, and are found by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import hashlib
import os
from pathlib import Path
import subprocess
import sys
import tempfile

import psutil

from cluster.ray_environment import ray_environment

MARK = "DERM_NODE"
_STOP_TIMEOUT_S = 15


class RayFailed(RuntimeError):
    """The Ray node did not start."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """The node below `home`; it listens on loopback only."""

    home: Path
    port: int = 6379
    dashboard: bool = False
    object_store_bytes: int = 150_000_000

    @property
    def address(self) -> str:
        """Where clients of this node connect."""
        return f"127.0.0.1:{self.port}"

    @property
    def directory(self) -> Path:
        """Ray's logs and sockets, 0700. Outside `home`: a socket's path may have 107 bytes."""
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:10]
        return Path(tempfile.gettempdir()) / f"derm-{os.geteuid()}-{name}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, and of whoever connects to it."""
        return {**os.environ, **ray_environment(self.home), MARK: str(self.home)}

    def start(self) -> None:
        """Start GCS and raylet. Raises RayFailed with Ray's own words."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        status = self.directory.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RayFailed(f"{self.directory} is not this user's alone; remove it.")
        spill = self.home / "spill"
        spill.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *("--node-ip-address", "127.0.0.1", "--port", str(self.port)),
            *("--dashboard-host", "127.0.0.1", f"--include-dashboard={str(self.dashboard).lower()}"),
            *("--no-monitor", "--include-log-monitor=false"),
            *("--object-store-memory", str(self.object_store_bytes)),
            *("--temp-dir", str(self.directory), "--object-spilling-directory", str(spill)),
            *("--disable-usage-stats", "--labels", "tier=clinic"),
        ]
        with (self.directory / "start.log").open("w+") as log:
            done = subprocess.run(command, env=self.environment, stdout=log, stderr=log, check=False)
            log.seek(0)
            said = log.read()
        if done.returncode != 0:
            self.stop()
            raise RayFailed(f"The Ray node did not start:\n{said[-2000:]}")
        self._close_client_server()

    def is_running(self) -> bool:
        """Whether this node's raylet and GCS live."""
        names = {process.name() for process in self.processes()}
        return {"raylet", "gcs_server"} <= names

    def stop(self) -> None:
        """End every process of this node: first politely, after 15 s by force."""
        processes = list(self.processes())
        for process in processes:
            _signal(process, force=False)
        _, alive = psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
        for process in alive:
            _signal(process, force=True)
        psutil.wait_procs(alive, timeout=_STOP_TIMEOUT_S)

    def _close_client_server(self) -> None:
        """End Ray Client's server: a second way in, and 55 MB, that `ray start` cannot be told to leave out."""
        for process in self.processes():
            if "ray.util.client.server" in process.cmdline():
                _signal(process, force=False)

    def processes(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == str(self.home)
            except (psutil.Error, OSError):
                continue
            if marked and process.pid != os.getpid():
                yield process


def _signal(process: psutil.Process, *, force: bool) -> None:
    try:
        if force:
            process.kill()
        else:
            process.terminate()
    except psutil.NoSuchProcess:
        return

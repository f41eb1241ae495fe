"""One Ray head node, with nothing that the service does not need; stopped without touching another.

`ray stop` ends every Ray process of the machine. Ours carry a mark in their environment,
which all their children inherit, and are found by it. Some rewrite their environment with
their title; those are found as descendants, or in the session that `ray start` opened.
"""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
import os
from pathlib import Path
import signal
import subprocess
import sys

import psutil

from cluster.ray_environment import ray_environment

MARK = "DERM_NODE"
#: What a node cannot be without. Everything else Ray itself starts again.
CORE = frozenset({"gcs_server", "raylet"})

_RUN = Path("/tmp")  # noqa: S108  in a folder of our own, 0700; $TMPDIR may be too long for a socket
_DRAIN_S, _RAYLET_S, _STOP_S = 5.0, 10.0, 5.0


class RayFailed(RuntimeError):
    """The Ray node did not start."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """The node below `home`; it listens on loopback only.

    `stats_port` and `metrics_port` are HAProxy's, `dashboard_port` is taken with `dashboard` only.
    """

    home: Path
    port: int = 6379
    dashboard: bool = False
    object_store_bytes: int = 150_000_000
    dashboard_port: int = 8265
    stats_port: int = 8404
    metrics_port: int = 9101

    @property
    def address(self) -> str:
        """Where clients of this node connect."""
        return f"127.0.0.1:{self.port}"

    @property
    def directory(self) -> Path:
        """Ray's logs and sockets, 0700. Outside `home`: a socket's path may have 107 bytes."""
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:8]
        return _RUN / f"derm-{os.geteuid()}-{name}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, and of whoever connects to it."""
        return {
            # The schema's owner is nobody's business on the node.
            **{name: value for name, value in os.environ.items() if name != "DERM_OWNER_DATABASE_URL"},
            **ray_environment(self.home, self.directory),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self.stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self.metrics_port),
            MARK: str(self.home),
        }

    def start(self) -> None:
        """Start GCS and raylet. Raises RayFailed with Ray's own words; `stop` then cleans up."""
        self._lay_out()
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *("--node-ip-address", "127.0.0.1", "--port", str(self.port)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *(f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-agent-listen-port", "0"),
            *("--no-monitor", "--include-log-monitor=false"),
            *("--object-store-memory", str(self.object_store_bytes)),
            # Ray opens its own folder to everyone (0777), so it lies inside ours.
            *("--temp-dir", str(self.directory / "r")),
            *("--object-spilling-directory", str(self.home / "spill")),
            *("--disable-usage-stats", "--labels", "tier=clinic"),
        ]
        log = self.directory / "start.log"
        with log.open("w") as output:
            # A session of its own: Ctrl-C at a terminal is for the supervisor alone.
            done = subprocess.run(
                command,
                env=self.environment | {"RAY_START_HOOK": "cluster.ray_start.leave_out_client_server"},
                stdout=output,
                stderr=output,
                check=False,
                start_new_session=True,
            )
        if done.returncode != 0:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RayFailed(f"The Ray node did not start: {said[-1]} (all of it: {log})")
        if not self.dashboard:
            self._end_idle_dashboard()

    def is_running(self) -> bool:
        """Whether this node's raylet and GCS live."""
        return live(self.core())

    def core(self) -> list[psutil.Process]:
        """The processes that the node cannot be without."""
        return [process for process in self._marked() if _name(process) in CORE]

    def processes(self) -> list[psutil.Process]:
        """Every process of this node, the caller and its ancestors aside."""
        found = set(self._marked())
        for process in list(found):
            found.update(_descendants(process))
        sessions = {_session(process) for process in found if _name(process) in CORE} - {os.getsid(0), None}
        if sessions:
            found.update(process for process in psutil.process_iter() if _session(process) in sessions)
        ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
        return [process for process in found if process.pid not in ourselves]

    def stop(self) -> None:
        """End every process of this node.

        First the front door, which finishes what it has begun, then the raylet, which ends its
        workers, then the rest. What an assessment still lacks is made up for at the next start.
        """
        processes = self.processes()
        front = [process for process in processes if _name(process) == "haproxy"]
        _end(front, signal.SIGUSR1, _DRAIN_S)
        _end([process for process in processes if _name(process) == "raylet"], signal.SIGTERM, _RAYLET_S)
        processes = list({*processes, *self.processes()})
        _end(processes, signal.SIGTERM, _STOP_S)
        _end([process for process in processes if process.is_running()], signal.SIGKILL, _STOP_S)

    def _lay_out(self) -> None:
        self.directory.mkdir(mode=0o700, exist_ok=True)
        status = self.directory.lstat()
        if self.directory.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise RayFailed(f"{self.directory} is not this user's alone; remove it.")
        (self.home / "spill").mkdir(mode=0o700, parents=True, exist_ok=True)

    def _end_idle_dashboard(self) -> None:
        # `ray start` runs this one even when told not to: it would only collect usage statistics.
        idle = [process for process in self._marked() if "dashboard.py" in " ".join(_command(process)[:3])]
        _end(idle, signal.SIGTERM, 0)

    def _marked(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.home) and process.pid != os.getpid():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found


def live(core: list[psutil.Process]) -> bool:
    """Whether a node lives whose core this was, without looking at every process of the machine."""
    return {_name(process) for process in core if process.is_running()} == CORE


def _name(process: psutil.Process) -> str:
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    except psutil.Error:
        return ""


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


def _end(processes: list[psutil.Process], number: signal.Signals, timeout_s: float) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=timeout_s)

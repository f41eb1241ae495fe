"""One Ray head node, with nothing that the service does not need; stopped without touching another.

`ray stop` would end every Ray process of the machine; ours are found by their mark instead.
"""

from __future__ import annotations

from dataclasses import dataclass
import hashlib
import os
from pathlib import Path
import shutil
import signal
import stat
import subprocess
import sys

import psutil

from cluster.node_files import is_production
from cluster.object_memory import SHARED, advice, empty, has_room
from cluster.ray_environment import ray_environment
from cluster.ray_processes import MARK, belonging, core, end, in_session, live, name
from serve_app.settings import REPOSITORY

_RUN = Path("/tmp")  # noqa: S108  in a folder of our own, 0700; $TMPDIR may be too long for a socket
_SESSIONS = 3  # whose logs are kept, the coming one included
_ATTEMPTS = 3
_DRAIN_S, _RAYLET_S, _STOP_S = 5.0, 10.0, 5.0


class RayFailed(RuntimeError):
    """The Ray node did not start."""


@dataclass(frozen=True, slots=True)
class RayNode:
    """The node below `home`; it listens on loopback only.

    `stats_port` and `metrics_port` are HAProxy's, `fallback_port` is where Serve's own proxy stands
    in for it, `dashboard_port` is taken with `dashboard` only. `memory` is the file system that is to
    hold its objects.
    """

    home: Path
    port: int = 6379
    dashboard: bool = False
    object_store_bytes: int = 150_000_000
    dashboard_port: int = 8265
    stats_port: int = 8404
    metrics_port: int = 9101
    fallback_port: int = 8500
    memory: Path = SHARED

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
    def objects(self) -> Path:
        """Where Ray's objects go, 0700: in memory. Without room there, below `home`, where production refuses."""
        return self.memory / self.directory.name

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, and of whoever connects to it."""
        return {
            # No replica has any business with the schema's owner; a job finds it in a file.
            **{name: value for name, value in os.environ.items() if name != "DERM_OWNER_DATABASE_URL"},
            **ray_environment(self.home, self.directory),
            # Workers look for our code before anything has told them where it is.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
            # Counters of every call, for the dashboard: a twentieth of the work where nobody looks.
            "RAY_enable_metrics_collection": str(int(self.dashboard)),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self.stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self.metrics_port),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(self.fallback_port),
            MARK: str(self.home),
        }

    def start(self) -> None:
        """Start GCS and raylet. Raises RayFailed with Ray's own words."""
        objects = self._lay_out()
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *("--node-ip-address", "127.0.0.1", "--port", str(self.port)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *(f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-agent-listen-port", "0"),
            *("--no-monitor", "--include-log-monitor=false"),
            *("--object-store-memory", str(self.object_store_bytes)),
            # Ray opens its own folder to everyone (0777), so it lies inside ours.
            *("--temp-dir", str(self.directory / "r")),
            *("--plasma-directory", str(objects), "--object-spilling-directory", str(objects)),
            *("--disable-usage-stats", "--labels", "tier=clinic"),
        ]
        log = self.directory / "start.log"
        for _ in range(_ATTEMPTS):
            code = self._run(command, log)
            if code <= 0:
                break
        if code != 0:
            said = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
            raise RayFailed(f"The Ray node did not start: {said[-1]} (all of it: {log})")

    def is_running(self) -> bool:
        """Whether this node's raylet and GCS live."""
        return live(core(self.home))

    def processes(self) -> list[psutil.Process]:
        """Every process of this node, the caller and its ancestors aside."""
        return belonging(self.home)

    def stop(self) -> None:
        """End every process of this node.

        First the front door, which finishes what it has begun, then the raylet, which ends its
        workers, then the rest. What an assessment still lacks is made up for at the next start.
        """
        processes = self.processes()
        end([process for process in processes if name(process) == "haproxy"], signal.SIGUSR1, _DRAIN_S)
        end([process for process in processes if name(process) == "raylet"], signal.SIGTERM, _RAYLET_S)
        processes = list({*processes, *self.processes()})
        end(processes, signal.SIGTERM, _STOP_S)
        end([process for process in processes if process.is_running()], signal.SIGKILL, _STOP_S)
        if _is_ours(self.objects):
            shutil.rmtree(self.objects, ignore_errors=True)
        empty(self.home / "spill")

    def _run(self, command: list[str], log: Path) -> int:
        with log.open("w") as output:
            # A session of its own: Ctrl-C at a terminal is for the supervisor alone.
            child = subprocess.Popen(
                command,
                env={**self.environment, **_start_environment()},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        code = child.wait()
        if code != 0:
            # The raylet gives its agents 15 s, which a busy machine may need for their imports alone.
            end(in_session(child.pid), signal.SIGKILL, _STOP_S)
        return code

    def _lay_out(self) -> Path:
        """Make the node's folders; return the one for objects, empty."""
        self.directory.mkdir(mode=0o700, exist_ok=True)
        if not _is_ours(self.directory):
            raise RayFailed(f"{self.directory} is not this user's alone; remove it.")
        shutil.rmtree(self.directory / "h", ignore_errors=True)
        sessions = sorted((self.directory / "r").glob("session_2*"))
        for session in sessions[: -_SESSIONS + 1]:
            shutil.rmtree(session, ignore_errors=True)
        return self._lay_out_objects()

    def _lay_out_objects(self) -> Path:
        objects = self.objects
        if not has_room(self.memory, self.object_store_bytes):
            if is_production(self.home):
                raise RayFailed(f"{advice(self.memory, self.object_store_bytes)}.")
            objects = self.home / "spill"
        objects.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(objects):
            raise RayFailed(f"{objects} is not this user's alone; remove it.")
        empty(objects)
        return objects


def _is_ours(folder: Path) -> bool:
    """Whether a folder in a place where everyone may write is this user's, and nobody else's."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _start_environment() -> dict[str, str]:
    # `ray job submit -- python ...` runs whatever `python` is on the node: it must be the one with our packages.
    here = str(Path(sys.executable).parent)
    return {
        "RAY_START_HOOK": "cluster.ray_start.leave_out_the_needless",
        "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)]),
    }

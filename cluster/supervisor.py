"""`derm-cds serve`: brings the service up, keeps it up, and takes all of it down again.

PostgreSQL and Ray start side by side; the database is prepared as soon as it answers, the
graph deployed when both are done. Every step runs in a process that can be given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
from threading import Event, Thread
import time
from types import FrameType
from typing import Any
import urllib.request

from cluster.deployed import watch_deployed
from cluster.node_files import own_database, write_owner_environment, write_service_environment
from cluster.ports import choose_port, is_listened_on, listener_on
from cluster.postgres import DatabaseUrls, EmbeddedPostgres, supervise
from cluster.ray_node import RayFailed, RayNode, core, live
from cluster.running import Running, announce, occupy
from serve_app.domain.errors import DermError
from serve_app.settings import REPOSITORY

#: What a node takes if it can, by RayNode's names.
PORTS: dict[str, Any] = {
    field.name: field.default for field in fields(RayNode) if field.name.endswith("port")
}

_LOOK_EVERY_S = 1.0
_STEP_EVERY_S = 0.1
_BACKOFF_S = (2.0, 60.0)
_SIGN_WITHIN_S = 20.0
_READY_TIMEOUT_S = 120
_DEPLOY_TIMEOUT_S = 600
_END_CHILD_S = 5

_started = time.monotonic()


class StartFailed(DermError):
    """The service did not start."""


class GivenUp(Exception):
    """Somebody asked for the service to stop while it was starting."""


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """What `derm-cds serve` was asked for."""

    home: Path
    host: str = "127.0.0.1"
    port: int = 8000
    profile: str = "cpu"
    model: str | None = None
    dashboard: bool = False


def report(message: str) -> None:
    """Print a step for the person at the terminal, with the seconds since this process started."""
    # One write, end and all: lines of two threads must not run together.
    print(f"[{time.monotonic() - _started:6.1f} s] {message}\n", end="", flush=True)


@dataclass(frozen=True, slots=True)
class Startup:
    """How one service is to be brought up; `stop` gives it up between and within steps."""

    request: ServeRequest
    node: RayNode
    postgres: EmbeddedPostgres | None
    stop: Event

    def bring_up(self) -> dict[str, str] | None:
        """Start everything and wait until it answers; return what a first request takes, if anything (cluster.prepare)."""
        with self._deploying() as deploy:
            with ThreadPoolExecutor(max_workers=2) as threads:
                first = threads.submit(self._start_database)
                steps: set[Future[Any]] = {first, threads.submit(self._start_ray)}
                try:
                    self._await(steps)
                except BaseException:
                    self.node.stop()  # and with it whatever a step is waiting for: all carry its mark
                    raise
            self._finish(deploy)
        return first.result()

    def deploy(self) -> None:
        """Deploy the graph on the running node, and wait until it answers."""
        with self._deploying() as deploy:
            self._finish(deploy)

    def _await(self, steps: set[Future[Any]]) -> None:
        while steps:
            done, steps = wait(steps, timeout=_STEP_EVERY_S, return_when=FIRST_EXCEPTION)
            for step in done:
                step.result()
            if self.stop.is_set():
                raise GivenUp

    def _start_ray(self) -> None:
        report("Ray: starting the node")
        self.node.start()
        report("Ray: the node is up")

    def _start_database(self) -> dict[str, str] | None:
        own = urls = own_database(self.node.home)
        if self.postgres is not None:
            report("PostgreSQL: starting")
            urls = self.postgres.ensure()
            report("PostgreSQL: takes connections")
        assert urls is not None  # noqa: S101  the one or the other
        write_service_environment(self.node.home, None if own else urls)
        write_owner_environment(self.node.home, urls)
        return self._prepare(urls)

    def _prepare(self, urls: DatabaseUrls) -> dict[str, str] | None:
        environment = {
            **self.node.environment,
            "DERM_DATABASE_URL": urls.app,
            "DERM_OWNER_DATABASE_URL": urls.owner,
        }
        command = [sys.executable, "-m", "cluster.prepare"]
        command += ["--model", self.request.model] if self.request.model else []
        log = self._log("prepare")
        with log.open("w") as errors:
            child = subprocess.Popen(
                command,
                env=environment,
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                process_group=0,
            )
        assert child.stdout is not None  # noqa: S101
        said: str | None = None
        for line in child.stdout:
            if said is not None:
                report(said)
            said = line.strip()
        if child.wait() != 0:
            raise StartFailed(_last_words(log))
        first: dict[str, str] | None = json.loads(said or "null")
        return first

    @contextmanager
    def _deploying(self) -> Iterator[subprocess.Popen[str]]:
        """Have the process that will deploy; it imports while the node starts, and is ended with the block."""
        command = [sys.executable, "-m", "cluster.deploy", "--wait", "--address", self.node.address]
        command += ["--host", self.request.host, "--port", str(self.request.port)]
        command += ["--profile", self.request.profile]
        with self._log("deploy").open("w") as log:
            child = subprocess.Popen(
                command,
                env=self.node.environment,
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                process_group=0,
            )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.communicate(timeout=_END_CHILD_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()

    def _finish(self, deploy: subprocess.Popen[str]) -> None:
        """Have it deploy, and wait until the service answers."""
        report("graph: deploying preprocess, classifier, embedder, retriever, risk and the ingress")
        assert deploy.stdin is not None  # noqa: S101
        with suppress(BrokenPipeError):  # it has died, and its log says why
            deploy.stdin.write("go\n")
            deploy.stdin.flush()
        alive, deadline, log = core(self.node.home), time.monotonic() + _DEPLOY_TIMEOUT_S, self._log("deploy")
        while deploy.poll() is None:
            self._pause()
            if not live(alive):
                raise RayFailed("The node died while the graph was being deployed.")
            if time.monotonic() > deadline:
                raise RayFailed(f"The graph was not up within {_DEPLOY_TIMEOUT_S} s; see {log}.")
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("graph: "):
                report(line)
        if deploy.returncode != 0:
            raise RayFailed(f"The graph was not deployed: {_last_words(log)} (all of it: {log}).")
        self._wait_ready()

    def _wait_ready(self) -> None:
        host = self.request.host
        url = f"http://{'127.0.0.1' if host in {'0.0.0.0', '::'} else host}:{self.request.port}"  # noqa: S104
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310
                if answer.status == 200:
                    return
            if time.monotonic() > deadline:
                raise StartFailed(f"/readyz did not answer 200 within {_READY_TIMEOUT_S} s.")
            self._pause()

    def _pause(self) -> None:
        if self.stop.wait(_STEP_EVERY_S):
            raise GivenUp

    def _log(self, name: str) -> Path:
        directory = self.node.home / "log"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory / f"{name}.log"


def _last_words(log: Path) -> str:
    """The last line that begins a statement: of a traceback, the exception's own."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1].strip()]
    return lines[-1] if lines else "it said nothing"


def serve(request: ServeRequest, *, on_ready: Callable[[str, dict[str, str] | None], None]) -> None:
    """Serve until SIGINT or SIGTERM; then stop all that belongs to this home, and nothing else.

    `on_ready(url, first)` is told once that the service answers, with what a first request takes.
    Raises AlreadyRunning, StartFailed, RayFailed or PostgresFailed.
    """
    home = request.home
    with occupy(home), _asked_to_stop() as stop:
        stale = RayNode(home)
        if stale.processes():
            report("Ray: ending what an earlier start left behind")
            stale.stop()
        node = _node(request)
        postgres = None if own_database(home) else EmbeddedPostgres(home)
        startup = Startup(request, node, postgres, stop)
        running = _describe(request, node)
        announce(home, running)
        try:
            first = startup.bring_up()
            announce(home, replace(running, ready=True))
            on_ready(running.url, first)
            _keep_up(startup)
        except GivenUp:
            pass
        finally:
            _take_down(node, postgres)


def end_leftovers(home: Path) -> bool:
    """End what a killed start left: the node and PostgreSQL. Returns whether there was anything.

    A server that only a command has started is left to it. Raises AlreadyRunning or PostgresFailed.
    """
    if not home.exists():
        return False
    with occupy(home) as killed:
        node = RayNode(home)
        postgres = None if own_database(home) else EmbeddedPostgres(home)
        left = bool(node.processes()) or (killed and postgres is not None and postgres.is_running())
        if left:
            _take_down(node, postgres)
        return left


def _node(request: ServeRequest) -> RayNode:
    if is_listened_on(request.host, request.port):
        raise StartFailed(
            f"Port {request.port} on {request.host} is taken by {listener_on(request.port)}; "
            "stop that, or choose another with --port."
        )
    chosen: dict[str, int] = {}
    for name, wanted in PORTS.items():
        chosen[name] = choose_port(wanted, taken=[request.port, *chosen.values()])
    return RayNode(request.home, dashboard=request.dashboard, **chosen)


def _describe(request: ServeRequest, node: RayNode) -> Running:
    host = f"[{request.host}]" if ":" in request.host else request.host
    return Running(
        pid=os.getpid(),
        url=f"http://{host}:{request.port}",
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        ready=False,
        profile=request.profile,
        ray_port=node.port,
        stats_port=node.stats_port,
        metrics_port=node.metrics_port,
        fallback_port=node.fallback_port,
        dashboard_port=node.dashboard_port if node.dashboard else None,
    )


@contextmanager
def _asked_to_stop() -> Iterator[Event]:
    stop = Event()

    def ask(_number: int, _frame: FrameType | None) -> None:
        if not stop.is_set():
            report("stopping")
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _keep_up(startup: Startup) -> None:
    """Watch until asked to stop; what has died is started again, ever more slowly while that fails."""
    if startup.postgres is not None:
        Thread(target=supervise, args=(startup.postgres, startup.stop), daemon=True).start()
    node, backoff_s = startup.node, _BACKOFF_S[0]
    Thread(target=watch_deployed, args=(node, startup.stop), daemon=True).start()
    alive, up = core(node.home), True
    while not startup.stop.wait(_LOOK_EVERY_S):
        if up and live(alive):
            if not node.decodes():
                report("decoder: it has died; starting it again")
                try:
                    node.start_decoder()
                except RayFailed as error:
                    report(f"decoder: {error}")
            continue
        report("Ray: the node has died; starting it again" if up else "Ray: trying again")
        try:
            node.stop()
            node.start()
            startup.deploy()
        except (RayFailed, StartFailed) as error:
            up = False
            report(f"Ray: {error} Next try in {backoff_s:.0f} s.")
            startup.stop.wait(backoff_s)
            backoff_s = min(2 * backoff_s, _BACKOFF_S[1])
        else:
            alive, up, backoff_s = core(node.home), True, _BACKOFF_S[0]
            report("ready again")


def _sign_last(home: Path, postgres: EmbeddedPostgres | None) -> None:
    """Sign the audit log's end while the database is there: the replicas were ended without time for it.

    In a process of its own, as all that needs the database: the supervisor, which stays, is spared its memory.
    """
    if postgres is not None and not postgres.is_running():
        return
    command = [sys.executable, "-m", "cluster.cli", "audit", "--home", str(home), "checkpoint"]
    try:
        child = subprocess.run(
            command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=_SIGN_WITHIN_S,
            process_group=0,
            check=False,
        )
    except subprocess.TimeoutExpired:
        report("audit log: the last checkpoint took too long; the next start signs it")
        return
    said = child.stderr.strip().splitlines() or ["it said nothing"]
    report("audit log: signed" if child.returncode == 0 else f"audit log: {said[-1]}")


def _take_down(node: RayNode, postgres: EmbeddedPostgres | None) -> None:
    node.stop()
    report("Ray: stopped")
    _sign_last(node.home, postgres)
    if postgres is not None:
        postgres.stop()
        report("PostgreSQL: stopped")

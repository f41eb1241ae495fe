"""Bringing the service up: the order of its parts, and what each needs of the others.

PostgreSQL and Ray start side by side; the database is prepared as soon as it answers, the
graph deployed when both are done. Every step runs in a process that can be given up.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
import json
from pathlib import Path
import subprocess
import sys
from threading import Event
import time
from typing import Any
import urllib.error
import urllib.request

from cluster.node_files import own_database, write_owner_environment, write_service_environment
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.ray_node import RayFailed, RayNode
from cluster.ray_processes import core, live
from serve_app.domain.errors import DermError

_LOOK_EVERY_S = 0.1
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
    print(f"[{time.monotonic() - _started:6.1f} s] {message}", flush=True)


@dataclass(frozen=True, slots=True)
class Startup:
    """How one service is to be brought up; `stop` gives it up between and within steps."""

    request: ServeRequest
    node: RayNode
    postgres: EmbeddedPostgres | None
    stop: Event

    def bring_up(self) -> dict[str, str] | None:
        """Start everything and wait until it answers; return prepare.FirstRequest's fields, if any."""
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
            done, steps = wait(steps, timeout=_LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
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
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, process_group=0
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
        if deploy.returncode != 0:
            raise RayFailed(f"The graph was not deployed: {_last_words(log)} (all of it: {log}).")
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("graph: "):
                report(line)
        self._wait_ready()

    def _wait_ready(self) -> None:
        host = self.request.host
        address = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _is_ready(f"http://{address}:{self.request.port}/readyz"):
            if time.monotonic() > deadline:
                raise StartFailed(f"/readyz did not answer 200 within {_READY_TIMEOUT_S} s.")
            self._pause()

    def _pause(self) -> None:
        if self.stop.wait(_LOOK_EVERY_S):
            raise GivenUp

    def _log(self, name: str) -> Path:
        directory = self.node.home / "log"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory / f"{name}.log"


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _last_words(log: Path) -> str:
    """The last line that begins a statement: of a traceback, the exception's own."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line[:1].strip()]
    return lines[-1] if lines else "it said nothing"

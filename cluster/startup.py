"""Bringing the service up: the order of its parts, and what each needs of the others.

PostgreSQL and Ray start side by side; the database is prepared as soon as it answers, the
graph deployed when both are done. Every step runs in a process that can be given up.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
import contextlib
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

from cluster.child import end_child, last_words
from cluster.database import own_database
from cluster.node_files import write_owner_environment, write_service_environment
from cluster.postgres import DatabaseUrls, EmbeddedPostgres
from cluster.progress import report
from cluster.ray_node import RayFailed, RayNode
from cluster.ray_processes import core, live
from serve_app.domain.errors import DermError

_LOOK_EVERY_S = 0.1
_READY_TIMEOUT_S = 120
_DEPLOY_TIMEOUT_S = 600


class StartFailed(DermError):
    """The service did not start."""


class GivenUp(Exception):
    """Somebody asked for the service to stop while it was starting."""


@dataclass(frozen=True, slots=True)
class Startup:
    """How one service is to be brought up; `stop` gives it up between and within steps."""

    node: RayNode
    postgres: EmbeddedPostgres | None
    host: str
    port: int
    profile: str
    model: str | None
    stop: Event

    def bring_up(self) -> dict[str, str] | None:
        """Start everything and wait until it answers; return prepare.FirstRequest's fields, if any."""
        graph = self._begin_deploy()
        try:
            with ThreadPoolExecutor(max_workers=2) as threads:
                first = threads.submit(self._start_database)
                steps: set[Future[Any]] = {first, threads.submit(self._start_ray)}
                try:
                    self._await(steps)
                except BaseException:
                    self.node.stop()  # and with it whatever a step is waiting for: all carry its mark
                    raise
            self._go(graph)
        finally:
            end_child(graph)
        self._wait_ready()
        return first.result()

    def deploy(self) -> None:
        """Deploy the graph on the running node, and wait until it answers."""
        graph = self._begin_deploy()
        try:
            self._go(graph)
        finally:
            end_child(graph)
        self._wait_ready()

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
        command += ["--model", self.model] if self.model else []
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
            raise StartFailed(last_words(log))
        first: dict[str, str] | None = json.loads(said or "null")
        return first

    def _begin_deploy(self) -> subprocess.Popen[str]:
        """Start the process that will deploy; it imports while the node starts."""
        command = [sys.executable, "-m", "cluster.deploy", "--wait", "--address", self.node.address]
        command += ["--host", self.host, "--port", str(self.port), "--profile", self.profile]
        with self._log("deploy").open("w") as log:
            return subprocess.Popen(
                command,
                env=self.node.environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                process_group=0,
            )

    def _go(self, graph: subprocess.Popen[str]) -> None:
        report("graph: deploying preprocess, classifier, embedder, retriever, risk and the ingress")
        assert graph.stdin is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError):  # it has died, and its log says why
            graph.stdin.write("go\n")
            graph.stdin.close()
        alive, deadline = core(self.node.home), time.monotonic() + _DEPLOY_TIMEOUT_S
        while graph.poll() is None:
            self._pause()
            if not live(alive):
                raise RayFailed("The node died while the graph was being deployed.")
            if time.monotonic() > deadline:
                raise RayFailed(
                    f"The graph was not up within {_DEPLOY_TIMEOUT_S} s; see {self._log('deploy')}."
                )
        log = self._log("deploy")
        if graph.returncode != 0:
            raise RayFailed(f"The graph was not deployed: {last_words(log)} (all of it: {log}).")
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("graph: "):
                report(line)

    def _wait_ready(self) -> None:
        address = "127.0.0.1" if self.host in {"0.0.0.0", "::"} else self.host  # noqa: S104
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not _is_ready(f"http://{address}:{self.port}/readyz"):
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

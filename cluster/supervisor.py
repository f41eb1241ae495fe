"""`derm-cds serve`: brings the service up, keeps it up, and takes all of it down again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
import os
from pathlib import Path
import signal
import subprocess
import sys
from threading import Event, Thread
from types import FrameType
from typing import Any

from cluster.deployed import watch_deployed
from cluster.node_files import own_database
from cluster.ports import choose_port, is_listened_on, listener_on
from cluster.postgres import EmbeddedPostgres, supervise
from cluster.ray_node import RayFailed, RayNode
from cluster.ray_processes import core, live
from cluster.running import Running, announce, occupy
from cluster.startup import GivenUp, ServeRequest, StartFailed, Startup, report

#: What a node takes if it can, by RayNode's names.
PORTS = {
    "port": 6379,
    "stats_port": 8404,
    "metrics_port": 9101,
    "dashboard_port": 8265,
    "fallback_port": 8500,
}

_LOOK_EVERY_S = 1.0
_BACKOFF_S = (2.0, 60.0)
_SIGN_WITHIN_S = 20.0


def serve(request: ServeRequest, *, on_ready: Callable[[str, dict[str, str] | None], None]) -> None:
    """Serve until SIGINT or SIGTERM; then stop all that belongs to this home, and nothing else.

    `on_ready(url, first)` is told once that the service answers, with prepare.FirstRequest's
    fields. Raises AlreadyRunning, StartFailed, RayFailed or PostgresFailed.
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


def _node(request: ServeRequest) -> RayNode:
    if is_listened_on(request.host, request.port):
        raise StartFailed(
            f"Port {request.port} on {request.host} is taken by {listener_on(request.port)}; "
            "stop that, or choose another with --port."
        )
    chosen: dict[str, Any] = {}
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
            command, capture_output=True, text=True, timeout=_SIGN_WITHIN_S, process_group=0, check=False
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

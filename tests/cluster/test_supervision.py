"""One service a home, which starts again what has died and ends what is its own, without a node."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from http.client import IncompleteRead
import os
from pathlib import Path
import signal
import socket
import stat
import subprocess
import sys
from threading import Event
import time
from types import SimpleNamespace

import psutil
import pytest

from cluster import deployed, supervisor
from cluster.deployed import keep_deployed, read_deployed, watch_deployed
from cluster.ports import choose_port
from cluster.ray_node import MARK, RayFailed, belonging, core, end, in_session, live, marked, name
from cluster.running import AlreadyRunning, Running, announce, occupy, running_service
from cluster.supervisor import ServeRequest, StartFailed

_RUNNING = Running(
    pid=os.getpid(),
    url="http://127.0.0.1:8000",
    started_at="2026-11-24T00:00:00+00:00",
    ready=False,
    profile="cpu",
    ray_port=6379,
    stats_port=8404,
    metrics_port=9101,
    fallback_port=8500,
)


def test_a_second_is_told_of_the_first_until_that_has_ended(tmp_path) -> None:
    assert running_service(tmp_path / "nothing") is None
    with occupy(tmp_path):
        assert running_service(tmp_path) is None  # nothing announced yet
        with pytest.raises(AlreadyRunning, match="already starting here"), occupy(tmp_path):
            pass
        announce(tmp_path, _RUNNING)
        with (
            pytest.raises(AlreadyRunning, match=r"already starting: http://127.0.0.1:8000") as refused,
            occupy(tmp_path),
        ):
            pass
        assert refused.value.running == _RUNNING
        announce(tmp_path, replace(_RUNNING, ready=True))
        assert "already running" in running_service(tmp_path).describe()
        assert stat.S_IMODE((tmp_path / "serve.json").stat().st_mode) == 0o600
    assert running_service(tmp_path) is None


def test_one_that_was_killed_leaves_the_home_free(tmp_path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from cluster.running import occupy\n"
        "with occupy(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"in\n"
        (tmp_path / "serve.json").write_text("{}")
        with pytest.raises(TypeError), occupy(tmp_path):  # held, and its notes are unreadable
            pass
        holder.kill()
    with occupy(tmp_path):
        assert not (tmp_path / "serve.json").exists()


class _Node:
    """A node that dies at once, and whose first start after that fails."""

    home = Path("/nonexistent")
    dashboard = False

    def __init__(self, stop: Event) -> None:
        self.said: list[str] = []
        self._stop = stop

    def stop(self) -> None:
        self.said.append("stop")

    def start(self) -> None:
        self.said.append("start")
        if self.said.count("start") == 1:
            raise RayFailed("no")

    def deploy(self) -> None:
        self.said.append("deploy")
        if self.said.count("deploy") == 1:
            raise StartFailed("no")
        self._stop.set()


def test_a_dead_node_is_started_and_the_graph_deployed_until_it_works(monkeypatch, capsys) -> None:
    stop = Event()
    node = _Node(stop)
    monkeypatch.setattr(supervisor, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr(supervisor, "core", lambda _home: [])
    alive = iter([True, False])
    monkeypatch.setattr(supervisor, "live", lambda _core: next(alive, False))
    startup = SimpleNamespace(node=node, postgres=None, stop=stop, deploy=node.deploy)
    supervisor._keep_up(startup)
    assert node.said == ["stop", "start", "stop", "start", "deploy", "stop", "start", "deploy"]
    assert "the node has died" in capsys.readouterr().out


def test_only_what_runs_is_kept_as_deployed_last(tmp_path, monkeypatch) -> None:
    """Not what is coming up, or failed; and nothing where the dashboard does not answer."""
    good, bad = ([{"name": "triage", "args": {"n": n}}] for n in (1, 2))
    answers = [
        OSError(),
        IncompleteRead(b""),
        ("DEPLOYING", bad),
        ("DEPLOY_FAILED", bad),
        ("RUNNING", []),
        ("RUNNING", good),
    ]
    stop = Event()

    def running(_node: object) -> list[dict]:
        answer = answers.pop(0)
        if not answers:
            stop.set()
        if isinstance(answer, Exception):
            raise answer
        status, applications = answer
        # One that was not deployed by a configuration has none.
        details = [{"status": status, "deployed_app_config": found} for found in [*applications, None]]
        return deployed.applications_of(details)

    monkeypatch.setattr(deployed, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(deployed, "_running", running)
    keep_deployed(tmp_path, over="digest", applications=[])
    watch_deployed(SimpleNamespace(home=tmp_path, dashboard=True), stop)
    assert read_deployed(tmp_path) == {"over": "digest", "applications": good}


def test_a_taken_port_is_named_with_its_owner_and_others_give_way(tmp_path, monkeypatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        with pytest.raises(StartFailed, match=rf"Port {taken} on 127\.0\.0\.1 is taken by .*pid"):
            supervisor._node(ServeRequest(tmp_path, port=taken))
        monkeypatch.setattr(supervisor, "PORTS", dict.fromkeys(supervisor.PORTS, taken))
        wanted = choose_port()
        assert choose_port(wanted) == wanted
        node = supervisor._node(ServeRequest(tmp_path, port=wanted))
    ports = {node.port, node.stats_port, node.metrics_port, node.dashboard_port, node.fallback_port}
    assert len(ports) == 5
    assert not {taken, wanted} & ports
    assert all(20_000 <= port < 32_768 for port in ports)  # out of the way of outgoing connections


def _until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def _names(processes: list[psutil.Process]) -> list[str]:
    return sorted(name(process) for process in processes)


@pytest.fixture
def start() -> Iterator:
    with ExitStack() as children:

        def run(*command: str, mark: str | None) -> subprocess.Popen:
            environment = {key: value for key, value in os.environ.items() if key != MARK}
            if mark is not None:
                environment[MARK] = mark
            child = subprocess.Popen(command, env=environment, start_new_session=True)
            children.callback(child.wait)
            children.callback(child.kill)
            return child

        yield run


def test_a_nodes_processes_are_the_marked_of_this_home_and_their_descendants(start, tmp_path) -> None:
    start("sleep", "60", mark=f"{tmp_path}x")
    start("sleep", "60", mark=None)
    ours = start("sh", "-c", "env -i sleep 60; true", mark=str(tmp_path))  # which drops the mark
    assert [process.pid for process in marked(tmp_path)] == [ours.pid]
    assert _until(lambda: _names(belonging(tmp_path)) == ["sh", "sleep"])
    end(belonging(tmp_path), signal.SIGKILL, 5)
    assert belonging(tmp_path) == []


def test_the_caller_and_its_ancestors_are_left_alone(tmp_path) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.ray_node import belonging\n"
        "print(len(belonging(Path(sys.argv[1]))))"
    )
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {MARK: str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert done.stdout == "0\n"


def test_a_session_is_whole(start) -> None:
    child = start("sh", "-c", "sleep 60 & sleep 60", mark=None)
    assert _until(lambda: _names(in_session(child.pid)) == ["sh", "sleep", "sleep"])
    end(in_session(child.pid), signal.SIGKILL, 5)
    assert in_session(child.pid) == []


def test_a_node_lives_while_its_core_does_and_a_zombie_is_dead(start, tmp_path) -> None:
    programs = {}
    for program in ("gcs_server", "raylet"):
        (tmp_path / program).symlink_to("/bin/sleep")
        programs[program] = start(str(tmp_path / program), "60", mark=str(tmp_path))
    assert not live([])
    assert _until(lambda: live(core(tmp_path)))
    found = core(tmp_path)
    programs["raylet"].kill()
    process = psutil.Process(programs["raylet"].pid)
    assert _until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert name(process) == ""
    assert not live(found)

"""One service a home, which starts again what has died and ends what is its own, without a node."""

from __future__ import annotations

from collections.abc import Iterator
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
from types import SimpleNamespace

from pip._vendor.distlib.scripts import ScriptMaker, enquote_executable
import psutil
import pytest

from cluster import deployed, ray_node, supervisor
from cluster.deployed import keep_deployed, read_deployed, watch_deployed
from cluster.ports import choose_port
from cluster.ray_node import (
    MARK,
    SHARED,
    RayFailed,
    RayNode,
    belonging,
    core,
    end,
    has_room,
    in_session,
    is_memory,
    live,
    marked,
    name,
    on_disk,
)
from cluster.running import AlreadyRunning, Running, announce, occupy, running_service
from cluster.supervisor import ServeRequest, StartFailed
from serve_app.settings import REPOSITORY
from tests.waiting import until

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
_MOUNTS = {"/": "ext4", "/dev/shm": "tmpfs", "/dev/shm/disk": "xfs", "/run": "tmpfs", "/over": "overlay"}


def test_a_second_is_told_of_the_first_until_that_has_ended(tmp_path, derm_cds) -> None:
    assert running_service(tmp_path / "nothing") is None
    (tmp_path / "serve.json").write_text("{}")  # of one that was killed
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
        second = derm_cds("serve", home=tmp_path)
        assert (second.code, "already running: http://127.0.0.1:8000" in second.out) == (0, True)
        assert "derm-cds stop" in second.out
        assert stat.S_IMODE((tmp_path / "serve.json").stat().st_mode) == 0o600
    assert running_service(tmp_path) is None


def test_a_dead_node_is_started_and_the_graph_deployed_until_it_works(monkeypatch, capsys) -> None:
    """Its first start after that fails, and the first deployment; a dead decoder is started alone, at the second try."""
    stop, said = Event(), []

    def do(what: str, error: Exception | None = None) -> None:
        said.append(what)
        if error is not None and said.count(what) == 1:
            raise error
        if said.count("deploy") == 2:
            stop.set()

    node = SimpleNamespace(
        home=Path("/nonexistent"),
        dashboard=False,
        stop=lambda: do("stop"),
        start=lambda: do("start", RayFailed("no")),
        decodes=lambda: said.count("decoder") > 1,
        start_decoder=lambda: do("decoder", RayFailed("no")),
    )
    monkeypatch.setattr(supervisor, "_LOOK_EVERY_S", 0)
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr(supervisor, "core", lambda _home: [])
    alive = iter([True, True, False])
    monkeypatch.setattr(supervisor, "live", lambda _core: next(alive, False))
    startup = SimpleNamespace(
        node=node, postgres=None, stop=stop, deploy=lambda: do("deploy", StartFailed("no"))
    )
    supervisor._keep_up(startup)
    assert said == [
        "decoder",
        "decoder",
        "stop",
        "start",
        "stop",
        "start",
        "deploy",
        "stop",
        "start",
        "deploy",
    ]
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


def test_a_taken_port_is_named_with_its_owner_and_others_give_way(tmp_path, monkeypatch, derm_cds) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        refused = derm_cds("serve", "--port", str(taken), home=tmp_path)
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert f"Port {taken} on 127.0.0.1 is taken by " in refused.err
        assert "(pid " in refused.err
        monkeypatch.setattr(supervisor, "PORTS", dict.fromkeys(supervisor.PORTS, taken))
        wanted = choose_port()
        assert choose_port(wanted) == wanted
        node = supervisor._node(ServeRequest(tmp_path, port=wanted))
    ports = {node.port, node.stats_port, node.metrics_port, node.dashboard_port, node.fallback_port}
    assert len(ports) == 5
    assert not {taken, wanted} & ports
    assert all(20_000 <= port < 32_768 for port in ports)  # out of the way of outgoing connections


def test_a_port_that_another_process_has_chosen_is_not_chosen_until_that_has_ended() -> None:
    """Nobody listens on it yet: HAProxy opens its ports long after they were chosen."""
    program = "from cluster.ports import choose_port; print(choose_port(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        chosen = int(other.stdout.readline())
        assert choose_port(chosen) != chosen
        other.communicate(b"\n")
    assert choose_port(chosen) == chosen


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
    assert until(lambda: [process.pid for process in marked(tmp_path)] == [ours.pid])
    assert until(lambda: _names(belonging(tmp_path)) == ["sh", "sleep"])
    assert _names(in_session(ours.pid)) == ["sh", "sleep"]
    end(belonging(tmp_path), signal.SIGKILL, 5)
    assert belonging(tmp_path) == in_session(ours.pid) == []


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


def test_a_node_lives_while_its_core_does_and_a_zombie_is_dead(start, tmp_path) -> None:
    programs = {}
    for program in ("gcs_server", "raylet"):
        (tmp_path / program).symlink_to("/bin/sleep")
        programs[program] = start(str(tmp_path / program), "60", mark=str(tmp_path))
    assert not live([])
    assert until(lambda: live(core(tmp_path)))
    found = core(tmp_path)
    programs["raylet"].kill()
    process = psutil.Process(programs["raylet"].pid)
    assert until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert name(process) == ""
    assert not live(found)


def test_a_file_system_is_memory_or_a_disk_and_a_link_is_where_it_leads(tmp_path: Path) -> None:
    for path in ("/dev/shm/derm-0-1", "/run/x"):
        assert is_memory(Path(path), _MOUNTS)
    for path in ("/dev/shm/disk/derm", "/runner", "/over/tmp", "/"):
        assert not is_memory(Path(path), _MOUNTS)
    (tmp_path / "linked").symlink_to("/dev/shm")
    assert is_memory(tmp_path / "linked" / "x", {str(tmp_path): "ext4", "/dev/shm": "tmpfs"})


def test_without_memory_a_raylet_is_found_and_production_does_not_start(tmp_path: Path, monkeypatch) -> None:
    """A machine with too little memory, then one whose file systems are all on disks."""
    assert not has_room(SHARED / "no such folder")
    with monkeypatch.context() as little:
        little.setattr(ray_node, "_ROOM", 1 << 60)
        assert not has_room(SHARED)
    monkeypatch.setattr(ray_node, "_MEMORY", frozenset())
    command = ["raylet", f"--plasma_directory={tmp_path}", "--fallback_directory=/", "--other=/var"]
    assert on_disk(command) == [Path("/"), tmp_path]
    assert not has_room(SHARED)
    monkeypatch.setenv("DERM_ENV", "production")
    with pytest.raises(RayFailed, match=r"in clear on a disk.*300 MB free.*--shm-size"):
        RayNode(tmp_path).start()
    assert not (tmp_path / "spill").exists()
    RayNode(tmp_path).directory.rmdir()


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    if not has_room(SHARED):
        pytest.skip("this machine has no room in /dev/shm")
    node = RayNode(tmp_path)
    node.objects.mkdir(mode=0o755)
    try:
        with pytest.raises(RayFailed, match="not this user's alone"):
            node.start()
    finally:
        node.objects.rmdir()
        node.directory.rmdir()


def test_a_stop_leaves_no_object_and_what_links_lead_to(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray_node, "SHARED", tmp_path)
    node = RayNode(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    for folder in (node.objects, tmp_path / "spill"):
        (folder / "ray_spilled_objects_1").mkdir(mode=0o700, parents=True)
        folder.chmod(0o700)
        (folder / "ray_spilled_objects_1" / "object").write_bytes(b"an image")
        (folder / "link").symlink_to(tmp_path / "kept")
        (folder / "file").touch()
    node.stop()
    assert not node.objects.exists()
    assert list((tmp_path / "spill").iterdir()) == []
    assert (tmp_path / "kept" / "file").exists()


@pytest.mark.parametrize("where", ["venv", "a venv"])
def test_an_installed_command_runs_nothing_of_the_folder_that_it_is_called_in(
    tmp_path: Path, where: str
) -> None:
    """Before its first line: Python imports `sitecustomize` from every part of PYTHONPATH, an empty one too."""
    venv, strange, home = tmp_path / where, tmp_path / "strange", tmp_path / "home"
    (venv / "bin").mkdir(parents=True)
    strange.mkdir()
    (strange / "sitecustomize.py").write_text("print('a stranger ran', flush=True); raise SystemExit(9)")
    maker = ScriptMaker(None, str(venv / "bin"))
    maker.executable = enquote_executable(str(venv / "bin" / "python"))
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    (venv / "lib").symlink_to(Path(sys.prefix) / "lib")
    maker.variants = {""}
    (command,) = maker.make("derm-cds = cluster.cli:main")
    prepare = 'cd "$1"; . ./scripts/environment.sh; isolate "$2"; isolate "$2"'
    subprocess.run(["/bin/bash", "-ec", prepare, "sh", REPOSITORY, command], check=True)
    for path in (":/opt/more", "/opt/more:", ".", "/opt/more::/opt/x"):
        environment = os.environ | {"PYTHONPATH": path}
        said = subprocess.run(
            [command, "stop", "--home", home],
            cwd=strange,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (said.returncode, said.stdout) == (0, "derm-cds is not running here.\n"), said.stderr


def test_scripts_keep_only_the_absolute_parts_of_a_path(tmp_path: Path) -> None:
    kept = 'cd "$2"; . "$1/scripts/environment.sh"; echo "$PYTHONPATH"'
    for path, left in ((":relative::/opt/more:.:/opt/a b:", "/opt/more:/opt/a b"), (":", ""), ("/a", "/a")):
        said = subprocess.run(
            ["/bin/bash", "-euc", kept, "sh", REPOSITORY, tmp_path],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout == f"{left}\n"


def test_a_stop_ends_what_a_killed_start_left(open_clinic, start, derm_cds, monkeypatch) -> None:
    """Its node and PostgreSQL; not the server that a command runs while nothing was killed."""
    home, server = open_clinic.home, open_clinic.server
    monkeypatch.setattr(supervisor, "_sign_last", lambda *_: None)
    try:
        server.ensure()
        assert derm_cds("stop", home=home).out == "derm-cds is not running here.\n"
        assert server.is_running()
        announce(home, _RUNNING)  # as one that was killed leaves it
        left = start("sleep", "60", mark=str(home))
        assert derm_cds("stop", home=home).out.endswith("ended what a killed start had left\n")
        assert left.poll() is not None
        assert not server.is_running()
        assert derm_cds("stop", home=home).out == "derm-cds is not running here.\n"
        with occupy(home):
            starting = derm_cds("stop", home=home)
            assert (starting.code, "already starting" in starting.err) == (1, True)
    finally:
        server.ensure()


def test_code_is_looked_for_in_no_folder_that_depends_on_the_place(tmp_path: Path, monkeypatch) -> None:
    """An empty part of PYTHONPATH is the folder that a process was started in."""
    monkeypatch.setenv("PYTHONPATH", ":relative::/opt/more:.")
    environment = RayNode(tmp_path).environment
    assert environment["PYTHONPATH"] == f"{REPOSITORY}:/opt/more"
    assert environment["PYTHONSAFEPATH"] == "1"


def test_a_line_of_serves_output_is_written_at_once(monkeypatch) -> None:
    """Lines of two threads do not run together."""
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    supervisor.report("Ray: started")
    assert [line[-13:] for line in written if line] == ["Ray: started\n"]

"""Finding the processes of one node, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from cluster.ray_processes import MARK, belonging, core, end, in_session, live, marked, name


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


def test_only_the_marked_of_this_home(start, tmp_path) -> None:
    ours = start("sleep", "60", mark=str(tmp_path))
    start("sleep", "60", mark=f"{tmp_path}x")
    start("sleep", "60", mark=None)
    assert [process.pid for process in marked(tmp_path)] == [ours.pid]
    assert [process.pid for process in belonging(tmp_path)] == [ours.pid]


def test_descendants_that_dropped_the_mark(start, tmp_path) -> None:
    start("sh", "-c", "env -i sleep 60; true", mark=str(tmp_path))
    assert _until(lambda: _names(belonging(tmp_path)) == ["sh", "sleep"])
    end(belonging(tmp_path), signal.SIGKILL, 5)
    assert belonging(tmp_path) == []


def test_the_caller_and_its_ancestors_are_left_alone(tmp_path) -> None:
    program = (
        "import sys; from pathlib import Path; from cluster.ray_processes import belonging\n"
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


def test_a_node_lives_while_its_core_does(start, tmp_path) -> None:
    programs = {}
    for program in ("gcs_server", "raylet"):
        (tmp_path / program).symlink_to("/bin/sleep")
        programs[program] = start(str(tmp_path / program), "60", mark=str(tmp_path))
    assert not live([])
    assert _until(lambda: live(core(tmp_path)))
    found = core(tmp_path)
    programs["raylet"].kill()
    programs["raylet"].wait()
    assert not live(found)


def test_an_ended_process_that_nobody_has_reaped_is_dead(start) -> None:
    child = start("true", mark=None)
    process = psutil.Process(child.pid)
    assert _until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert name(process) == ""

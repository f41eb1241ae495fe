"""One service a home."""

from __future__ import annotations

from dataclasses import replace
import os
import stat
import subprocess
import sys

import pytest

from cluster.running import AlreadyRunning, Running, announce, occupy, running_service

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


def test_a_second_is_told_of_the_first(tmp_path) -> None:
    with occupy(tmp_path):
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


def test_before_the_first_has_said_anything(tmp_path) -> None:
    with occupy(tmp_path), pytest.raises(AlreadyRunning, match="already starting here"), occupy(tmp_path):
        pass


def test_it_ends_with_the_block(tmp_path) -> None:
    with occupy(tmp_path):
        announce(tmp_path, _RUNNING)
    assert running_service(tmp_path) is None
    with occupy(tmp_path):
        pass


def test_a_look_does_not_get_in_the_way(tmp_path) -> None:
    assert running_service(tmp_path / "nothing") is None
    with occupy(tmp_path):
        assert running_service(tmp_path) is None  # nothing announced yet


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

"""`derm-cds serve`, whole: from nothing to a first answer, and down again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.commands.audit import checkpoint_log
from cluster.deployed import deployed_file
from cluster.ports import choose_port, listeners
from cluster.postgres import EmbeddedPostgres
from cluster.ray_node import RayNode, core
from cluster.running import running_service
from serve_app.settings import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

_BASH = shutil.which("bash") or "/bin/bash"
_READY_S = 600
_STOP_S = 60


@dataclass
class Service:
    """`derm-cds serve` on a home of its own; `said` is what it printed."""

    home: Path
    port: int = field(default_factory=choose_port)
    process: subprocess.Popen | None = None

    def command(self, name: str, *options: str) -> list[str]:
        return [sys.executable, "-m", "cluster.cli", name, "--home", str(self.home), *options]

    def run(self, name: str, *options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(name, *options), check=False, capture_output=True, text=True, timeout=120
        )

    def start(self, *options: str) -> None:
        output = self.home.parent / "said.txt"
        with output.open("w") as said:
            command = self.command("serve", "--port", str(self.port), *options)
            self.process = subprocess.Popen(command, stdout=said, stderr=said, cwd="/")
        deadline = time.monotonic() + _READY_S
        while "Ctrl-C stops" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.2)

    @property
    def said(self) -> str:
        return (self.home.parent / "said.txt").read_text()

    @property
    def request(self) -> str:
        """The request it printed, as a command line."""
        return re.search(r"^curl .*?(?<!\\)$", self.said, re.MULTILINE | re.DOTALL)[0]

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request with the token it printed."""
        token = re.search(r"Bearer ([\w.-]+)", self.said)[1]
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.request(
            method, f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=60, **options
        )


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # Not tmp_path: PostgreSQL's account must get through. A space, as a user's folder may have.
    with tempfile.TemporaryDirectory(prefix="derm start ") as folder:
        service = Service(Path(folder) / "home")
        try:
            service.start("--dashboard")
            yield service
        finally:
            if service.process.poll() is None:
                service.process.terminate()
                service.process.wait(_STOP_S)
            RayNode(service.home).stop()
            shutil.rmtree(RayNode(service.home).directory, ignore_errors=True)
            EmbeddedPostgres(service.home).stop()


@pytest.fixture(scope="module")
def first_answer(service: Service) -> dict:
    """The printed request, pasted."""
    command = f"{service.request} --write-out '\\n%{{http_code}}'"
    done = subprocess.run([_BASH, "-c", command], check=True, capture_output=True, text=True, cwd="/")
    body, _, code = done.stdout.rpartition("\n")
    assert code == "201", done.stdout
    return json.loads(body)


def test_the_printed_request_is_answered(service: Service, first_answer) -> None:
    assert first_answer["patient_id"] == "demo-patient"
    assert first_answer["outcome"] in {"decided", "review", "refused"}
    assert first_answer["provenance"]["model_id"]
    assert "drawn, not photographed" in service.said
    assert "never a diagnosis" in service.said


def test_a_second_start_says_what_runs(service: Service) -> None:
    done = service.run("serve", "--port", str(service.port))
    assert done.returncode == 0
    assert f"already running: http://127.0.0.1:{service.port}" in done.stdout
    assert str(service.process.pid) in done.stdout
    assert "derm-cds stop" in done.stdout


def test_another_home_is_told_that_the_port_is_taken(service: Service, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve", "--home", str(tmp_path / "other")]
    done = subprocess.run(
        [*command, "--port", str(service.port)], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert f"Port {service.port} on 127.0.0.1 is taken by haproxy" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_is_ready(service: Service) -> None:
    done = service.run("status", "--json")
    assert done.returncode == 0, done.stdout
    status = json.loads(done.stdout)
    assert status["readyz"] == "ready"
    assert status["schema"] == "up to date"
    assert int(status["references"]) > 0


def test_the_supervisor_is_small_and_no_part_runs_behind_other_programs(service: Service) -> None:
    supervisor = psutil.Process(service.process.pid)
    assert supervisor.memory_full_info().pss < 60e6
    assert {process.nice() for process in RayNode(service.home).processes()} == {supervisor.nice()}


def test_ports_are_those_of_the_documentation_and_none_is_on_every_interface(service: Service) -> None:
    documented = _documented_ports()
    listening = _listening(service)
    assert [found for found in listening if found[1] == "all"] == []
    assert any(process.startswith("ray::ServeRepl") for process, _, _ in listening), listening
    undocumented = [
        (process, address, port)
        for process, address, port in listening
        if not any(process.startswith(name) and low <= port <= high for name, low, high in documented)
    ]
    assert undocumented == []


def _documented_ports() -> list[tuple[str, int, int]]:
    """The rows of docs/operations.md: process, lowest and highest port."""
    rows = []
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    for process, port in re.findall(r"^\| `([\w:*-]+)` \| ([^|]+) \| [^|]+ \|", text, re.MULTILINE):
        numbers = [int(number) for number in re.findall(r"\d{4,}", port)]
        low, high = 1, 65535
        if numbers and "up" in port:
            low, high = numbers[0], numbers[0] + 1000
        elif len(numbers) == 2:
            low, high = numbers
        # One number is what is taken when it is free: on a test's machine it may not be.
        rows.append((process.replace("ServeReplica", "ServeRepli").removesuffix("*")[:15], low, high))
    assert len(rows) >= 10
    return rows


def _listening(service: Service) -> list[tuple[str, str, int]]:
    processes = {process.pid: process.name() for process in RayNode(service.home).processes()}
    processes[EmbeddedPostgres(service.home).pid()] = "postgres"
    found = [
        (listener.process, "loopback" if listener.loopback else "all", listener.port)
        for listener in listeners(processes)
    ]
    assert {"haproxy", "gcs_server", "raylet", "postgres"} <= {process for process, _, _ in found}
    return found


def test_a_dead_database_comes_back(service: Service) -> None:
    os.kill(EmbeddedPostgres(service.home).pid(), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while service.send("GET", "/readyz").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_serve_deploy(service: Service, first_answer: dict, tmp_path: Path) -> None:
    """The file an operator deploys, with one threshold changed: the answers name another policy."""
    config = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    config["http_options"]["port"] = service.port
    (risk,) = (d for d in config["applications"][0]["deployments"] if d["name"] == "risk")
    risk["user_config"] = {"review": {"min_margin": 0.11}}
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(config))
    exports = service.run("environment").stdout
    serve = f"{shlex.quote(sys.executable)} -m ray.serve.scripts"
    script = f"{exports}\n{serve} deploy {shlex.quote(str(tmp_path))}/serve_config.yaml && {serve} status"
    done = subprocess.run([_BASH, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 300
    while not (version := _policy_version(service)).startswith("2026-11.4+"):
        state = subprocess.run(
            [_BASH, "-c", f"{exports}\n{serve} status"], check=False, capture_output=True, text=True
        )
        assert "DEPLOY_FAILED" not in state.stdout, state.stdout
        assert time.monotonic() < deadline, version


def test_a_submitted_job_finds_what_it_needs_on_its_own(service: Service) -> None:
    """As docs/references.md has it: this Python, the node's home, the database as its owner, and the models."""
    program = (
        "import pandas; from serve_app.settings import *; from model_store.registry import ModelStore;"
        " assert find_owner_url(default_home()) and list(ModelStore(model_folder()));"
        f" assert default_home() == Path({str(service.home)!r})"
    )
    submit = f"{shlex.quote(sys.executable)} -m ray.scripts.scripts job submit -- python -c"
    script = f"{service.run('environment').stdout}\n{submit} {shlex.quote(shlex.quote(program))}"
    done = subprocess.run([_BASH, "-c", script], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_dead_node_comes_back_as_it_was_deployed_last(service: Service, first_answer: dict) -> None:
    """The operator's threshold is in force again, with no hand put to it; records and images are there."""
    path = f"/api/lesions/{first_answer['lesion_id']}"
    image = f"{path}/images/{first_answer['image_id']}"
    before = service.send("GET", image).content
    deadline = time.monotonic() + 60
    while "0.11" not in deployed_file(service.home).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for process in core(service.home):
        process.kill()
    deadline = time.monotonic() + 300
    while "ready again" not in service.said:
        assert time.monotonic() < deadline, service.said
        time.sleep(0.5)
    assert _policy_version(service).startswith("2026-11.4+")
    assert first_answer["assessment_id"] in service.send("GET", path).text
    assert service.send("GET", image).content == before


def _policy_version(service: Service) -> str:
    with (service.home / "sample-lesion.jpg").open("rb") as image:
        answer = service.send(
            "POST", "/api/lesions", files={"image": image}, data={"patient_id": "demo-patient"}
        )
    return answer.json()["provenance"]["policy_version"] if answer.status_code == 201 else ""


def test_a_stop_leaves_nothing_of_ours_and_ends_nobody_elses(service: Service) -> None:
    with subprocess.Popen(["/bin/sleep", "600"], env={"DERM_NODE": str(service.home) + "x"}) as stranger:
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(_STOP_S) == 0, service.said
        assert stranger.poll() is None
        stranger.kill()
    assert RayNode(service.home).processes() == []
    assert not EmbeddedPostgres(service.home).is_running()
    assert running_service(service.home) is None
    assert service.run("status").returncode == 3
    # The audit log is signed to its very end: nothing of this run is left to be written anew unseen.
    signed = checkpoint_log(service.home).read()[-1].position
    assert service.run("audit", "verify").stdout.startswith(f"{signed} events, ")

"""`derm-cds serve`, whole: from nothing to a first answer, and down again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
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
import warnings

import httpx
import psutil
import pytest
import yaml

from cluster.commands.audit import checkpoint_log
from cluster.deployed import deployed_file, keep_deployed
from cluster.ports import choose_port, listeners
from cluster.postgres import EmbeddedPostgres
from cluster.ray_node import RayNode, core
from cluster.running import running_service
from serve_app.settings import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

_READY_S = 600
_DERM_CDS = str(Path(sys.executable).with_name("derm-cds"))
#: What a process of ours imports or reads, whichever comes first.
_TAKEN = (
    "cluster",
    "serve_app",
    "graphs",
    "deployments",
    "data_jobs",
    "model_store",
    "ray",
    "yaml",
    "json",
    "numpy",
)
_STOP_S = 60


@dataclass
class Service:
    """`derm-cds serve` on a home of its own; `said` is what it printed."""

    home: Path
    port: int = field(default_factory=choose_port)
    process: subprocess.Popen | None = None

    @property
    def strange(self) -> Path:
        """The folder of somebody else that everything is called in."""
        return self.home.parent / "strange"

    def run(self, name: str, *options: str) -> subprocess.CompletedProcess:
        command = [_DERM_CDS, name, "--home", str(self.home), *options]
        return subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=120, cwd=self.strange
        )

    def start(self) -> None:
        command = [_DERM_CDS, "serve", "--home", str(self.home), "--port", str(self.port), "--dashboard"]
        with (self.home.parent / "said.txt").open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said, cwd=self.strange)
        self.until(lambda: "Ctrl-C stops" in self.said, _READY_S)

    def until(self, condition: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.5)

    @property
    def said(self) -> str:
        return (self.home.parent / "said.txt").read_text()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request with the token it printed."""
        token = re.search(r"Bearer ([\w.-]+)", self.said)[1]
        headers = {"Authorization": f"Bearer {token}"}
        return httpx.request(
            method, f"http://127.0.0.1:{self.port}{path}", headers=headers, timeout=60, **options
        )

    def policy_version(self) -> str:
        """What the next answer names."""
        with (self.home / "sample-lesion.jpg").open("rb") as image:
            answer = self.send(
                "POST", "/api/lesions", files={"image": image}, data={"patient_id": "demo-patient"}
            )
        assert answer.status_code == 201, answer.text
        return answer.json()["provenance"]["policy_version"]


def _shell(script: str) -> str:
    """Run what somebody pastes; return what it said."""
    done = subprocess.run(
        ["/bin/bash", "-ec", script], check=False, capture_output=True, text=True, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _with_margin(config: dict, margin: float) -> dict:
    (risk,) = (each for each in config["applications"][0]["deployments"] if each["name"] == "risk")
    risk["user_config"] = {"review": {"min_margin": margin}}
    return config


def _deploy_before(home: Path) -> None:
    """Leave the home as after an operator's `serve deploy` with another threshold, on an earlier node."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cluster.deploy import choose_config
    config, over = choose_config(home, host="127.0.0.1", port=8000, profile="cpu")
    keep_deployed(home, over=over, applications=_with_margin(config, 0.12)["applications"])


def _lay_traps(folder: Path) -> None:
    """Modules under our names, and those that Python imports by itself: each leaves a trace where it runs."""
    trap = f"open({str(folder / 'ran')!r}, 'a').write(__file__ + chr(10)); raise SystemExit('a stranger ran')"
    for name in _TAKEN:
        package = folder / name
        package.mkdir(parents=True)
        for module in ("__init__", "prepare", "deploy", "cli", "ray_hooks"):
            (package / f"{module}.py").write_text(trap)
    for module in ("sitecustomize", "usercustomize", "argparse"):
        (folder / f"{module}.py").write_text(trap)
    (folder / ".env").write_text(
        "DERM_ENV=production\nDERM_TOKEN_SECRET=a-strangers-own-secret-of-32-bytes\n"
    )


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # Not tmp_path: PostgreSQL's account must get through. A space, as a user's folder may have.
    with tempfile.TemporaryDirectory(prefix="derm start ") as folder:
        Path(folder).chmod(0o711)
        service = Service(Path(folder) / "home")
        _lay_traps(service.strange)
        service.home.mkdir(mode=0o711)
        _deploy_before(service.home)
        try:
            service.start()
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
    request = re.search(r"^curl .*?(?<!\\)$", service.said, re.MULTILINE | re.DOTALL)[0]
    body, _, code = _shell(f"{request} --write-out '\\n%{{http_code}}'").rpartition("\n")
    assert code == "201", body
    return json.loads(body)


def test_the_printed_request_is_answered_and_status_is_ready(service: Service, first_answer) -> None:
    assert first_answer["patient_id"] == "demo-patient"
    assert first_answer["outcome"] in {"decided", "review", "refused"}
    assert first_answer["provenance"]["model_id"]
    # The operator's threshold of the node before is in force again, without a hand.
    assert "as it was deployed last" in service.said
    assert first_answer["provenance"]["policy_version"].startswith("2026-11.4+")
    done = service.run("status", "--json")
    assert done.returncode == 0, done.stdout
    status = json.loads(done.stdout)
    assert (status["readyz"], status["schema"]) == ("ready", "up to date")
    assert int(status["references"]) > 0
    # With `--host` for other machines, what is told to loopback alone is had here, for the same status.
    fallback = f"http://127.0.0.1:{running_service(service.home).fallback_port}/readyz"
    assert httpx.get(fallback, timeout=30).json()["findings"] == []
    url, elsewhere = f"http://127.0.0.1:{service.port}/readyz", {"X-Forwarded-For": "203.0.113.9"}
    assert httpx.get(url, timeout=30, headers=elsewhere).json() == {"status": "ready"}


def test_nothing_ran_from_the_folder_that_it_was_started_in(service: Service, first_answer) -> None:
    """Our processes and Ray's, workers and commands: the folder was somebody else's, full of our names."""
    assert first_answer
    assert not (service.strange / "ran").exists(), (service.strange / "ran").read_text()


def test_ports_are_those_of_the_documentation_and_none_is_on_every_interface(service: Service) -> None:
    supervisor = psutil.Process(service.process.pid)
    assert supervisor.memory_full_info().pss < 60e6
    node = RayNode(service.home).processes()
    assert {process.nice() for process in node} == {supervisor.nice()}  # none behind other programs
    documented = _documented_ports()
    processes = {process.pid: process.name() for process in node}
    found = listeners({**processes, EmbeddedPostgres(service.home).pid(): "postgres"})
    assert {"haproxy", "gcs_server", "raylet", "postgres"} <= {each.process for each in found}
    assert any(each.process.startswith("ray::ServeRepl") for each in found), found
    assert [each for each in found if not each.loopback] == []
    undocumented = [
        each
        for each in found
        if not any(
            each.process.startswith(name) and low <= each.port <= high for name, low, high in documented
        )
    ]
    assert undocumented == []


def test_no_process_leaves_its_memory_behind_when_it_crashes(service: Service, first_answer: dict) -> None:
    """Images, keys and tokens are in it: the kernel writes no core file of any of them, and hands none on."""
    server = psutil.Process(EmbeddedPostgres(service.home).pid())
    supervisor = psutil.Process(service.process.pid)
    limits: dict[str, set[tuple[str, ...]]] = {}
    for process in (supervisor, server, *server.children(), *RayNode(service.home).processes()):
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            text = Path(f"/proc/{process.pid}/limits").read_text()
            found = re.search(r"^Max core file size +(\S+) +(\S+)", text, re.MULTILINE)
            limits.setdefault(process.name(), set()).add(found.groups())
    assert {"haproxy", "gcs_server", "raylet", "postgres"} <= limits.keys()
    assert sum(name.startswith("ray::") for name in limits) >= 3, limits
    assert set().union(*limits.values()) <= {("1", "1"), ("0", "0")}, limits


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


def test_serve_deploy_and_a_submitted_job(service: Service, first_answer: dict, tmp_path: Path) -> None:
    """The file an operator deploys, with one threshold changed: the answers name another policy, and it is kept.

    And as docs/references.md has it: this Python, the node's home, the database as its owner, and the models.
    """
    before = first_answer["provenance"]["policy_version"]
    config = yaml.safe_load((REPOSITORY / "serve_config.yaml").read_text())
    config["http_options"]["port"] = service.port
    (tmp_path / "serve_config.yaml").write_text(yaml.safe_dump(_with_margin(config, 0.11)))
    program = (
        "import pandas; from serve_app.settings import *; from model_store.registry import ModelStore;"
        " assert find_owner_url(default_home()) and list(ModelStore(model_folder()));"
        f" assert default_home() == Path({str(service.home)!r})"
    )
    python = shlex.quote(sys.executable)
    _shell(
        f"{service.run('environment').stdout}\n"
        f"{python} -m ray.serve.scripts deploy {shlex.quote(str(tmp_path))}/serve_config.yaml\n"
        f"{python} -m ray.scripts.scripts job submit -- python -c {shlex.quote(shlex.quote(program))}"
    )
    service.until(lambda: "0.11" in deployed_file(service.home).read_text(), 300)  # it runs
    after = service.policy_version()
    assert after.startswith("2026-11.4+")
    assert after != before


def test_a_dead_decoder_comes_back(service: Service, first_answer: dict) -> None:
    (decoder,) = (each for each in RayNode(service.home).processes() if each.name() == "derm-decoder")
    decoder.kill()
    service.until(lambda: "decoder: it has died" in service.said, 30)
    assert service.policy_version()  # of an upload


def test_a_dead_database_comes_back(service: Service, first_answer: dict) -> None:
    os.kill(EmbeddedPostgres(service.home).pid(), signal.SIGKILL)
    service.until(lambda: service.send("GET", "/readyz").status_code == 200, 60)
    answered = service.send("GET", f"/api/lesions/{first_answer['lesion_id']}").text
    assert first_answer["assessment_id"] in answered


def test_a_dead_node_comes_back_as_it_was_deployed_last(service: Service, first_answer: dict) -> None:
    """The operator's threshold is in force again, with no hand put to it; records and images are there."""
    path = f"/api/lesions/{first_answer['lesion_id']}"
    image = f"{path}/images/{first_answer['image_id']}"
    before, deployed = service.send("GET", image).content, service.policy_version()
    for process in core(service.home):
        process.kill()
    service.until(lambda: "ready again" in service.said, 300)
    assert service.policy_version() == deployed
    assert first_answer["assessment_id"] in service.send("GET", path).text
    assert service.send("GET", image).content == before


def test_a_stop_leaves_nothing_of_ours_and_ends_nobody_elses(service: Service) -> None:
    with subprocess.Popen(["/bin/sleep", "600"], env={"DERM_NODE": str(service.home) + "x"}) as stranger:
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(_STOP_S) == 0, service.said
        assert stranger.poll() is None
        stranger.kill()
    assert RayNode(service.home).processes() == []
    assert not EmbeddedPostgres(service.home).is_running()
    assert running_service(service.home) is None
    # The audit log is signed to its very end: nothing of this run is left to be written anew unseen.
    signed = checkpoint_log(service.home).read()[-1].position
    assert service.run("audit", "verify").stdout.startswith(f"{signed} events, ")

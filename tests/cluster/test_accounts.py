"""Which account a node runs as, and the unit that runs it under one of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
import pwd
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile

import psutil
import pytest

from cluster.accounts import POSTGRES, SERVICE, Account, AccountFailed, account_of, step_down
from cluster.ray_node import RayNode
from cluster.safety import account_findings, prevents_ready
from serve_app import sandbox
from serve_app.settings import REPOSITORY
from tests.cluster.clinic import python_for

AS_ROOT = os.geteuid() == 0
UNIT = REPOSITORY / "cluster" / "on_prem" / "derm-cds.service"
#: The default exposure of a service is 9.6 of 10; what systemd calls "OK" is below 5.
MOST_EXPOSED = 20


@pytest.fixture
def place():
    """A folder that every account may pass through."""
    with tempfile.TemporaryDirectory(prefix="derm-a-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


_STEP_DOWN = """
import json, os, sys
from pathlib import Path
from cluster.accounts import step_down
from cluster.postgres import EmbeddedPostgres
from serve_app.audit.events import os_account
home = Path(sys.argv[1])
os.umask(0o077)  # as a command has it
step_down(home, new=True)
server = EmbeddedPostgres(home)
server.ensure()
try:
    uids = Path(f"/proc/{server.pid()}/status").read_text().split("Uid:")[1].split()[:4]
finally:
    server.stop(mode="immediate")
def owner():
    try:
        os.setuid(0)
    except PermissionError:
        return "stays down"
ids = os.getresuid() + os.getresgid()
print(json.dumps({"ids": ids, "server": uids, "actor": os_account(), "back": owner()}))
"""


@pytest.mark.skipif(not AS_ROOT, reason="only root steps down")
def test_root_makes_a_home_for_an_account_of_the_services_own_and_becomes_it(place: Path) -> None:
    python = python_for(account_of(POSTGRES))
    if python is None or not sandbox.landlock_version() or not account_of(POSTGRES).reaches(REPOSITORY):
        pytest.skip("no account of the service's own can run this code here, or this kernel has no Landlock")
    packages = os.pathsep.join([str(REPOSITORY), sysconfig.get_paths()["purelib"]])
    home = place / "deep" / "home"
    done = subprocess.run(
        [python, "-c", _STEP_DOWN, str(home)],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    entry = pwd.getpwnam(SERVICE)
    assert got["ids"] == [entry.pw_uid] * 3 + [entry.pw_gid] * 3
    assert set(got["server"]) == {str(entry.pw_uid)}
    assert got["actor"] == "os:root"  # who acts, in the audit log
    assert got["back"] == "stays down"
    assert {path.lstat().st_uid for path in (home, *home.rglob("*"))} == {entry.pw_uid}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.skipif(not AS_ROOT, reason="only root steps down")
def test_root_does_not_step_down_to_whom_our_code_is_closed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = account_of(SERVICE)
    closed = place / "python"
    closed.symlink_to(sys.executable)
    place.chmod(0o700)
    home = place.parent / f"{place.name}-home"
    home.mkdir()
    try:
        os.chown(home, account.uid, account.gid)
        monkeypatch.setattr(sys, "executable", str(closed))
        with pytest.raises(AccountFailed, match=f"belongs to {SERVICE}, which cannot run"):
            step_down(home)
    finally:
        home.rmdir()
    assert os.geteuid() == 0


@pytest.mark.skipif(not AS_ROOT, reason="only root opens folders to others")
def test_what_an_account_cannot_reach_is_known_and_nothing_is_opened(place: Path) -> None:
    account = Account("somebody", 54321, 54321, switch=True)
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    assert account.reaches(place / "home")
    assert not account.reaches(closed / "home")
    closed.chmod(0o710)
    os.chown(closed, 0, 54321)
    assert account.reaches(closed / "deep" / "home")
    assert stat.S_IMODE(closed.stat().st_mode) == 0o710


def test_a_part_that_could_read_the_keys_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of the account that owns them, which has given nothing up; and the service as root."""
    (tmp_path / "keys").mkdir(mode=0o700)
    program = "from serve_app import sandbox; sandbox.name({!r}); print('up', flush=True); input()"
    for title in ("derm-decoder", "raylet"):
        with subprocess.Popen(
            [sys.executable, "-c", program.format(title)],
            env={**os.environ, "DERM_NODE": str(tmp_path)},
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b"up\n"
            found = account_findings(tmp_path)
            process.communicate(b"\n")
        said = [finding.advice for finding in found]
        expected = title == "derm-decoder" or AS_ROOT
        assert len(said) == expected, said
        assert all(("the decoder runs as" in line) == (title == "derm-decoder") for line in said)
        assert all(not prevents_ready(finding, env="development") for finding in found)
        assert all(prevents_ready(finding, env="production") for finding in found)


def test_a_nodes_decoder_is_of_another_account_than_its_keys_or_has_given_them_up(place: Path) -> None:
    node = RayNode(place)
    node.directory.mkdir(mode=0o700)
    try:
        node.start_decoder()
        assert node.decodes()
        (process,) = (each for each in node.processes() if each.pid == node._decoders[0].pid)
        until_named = psutil.Process(process.pid)
        for _ in range(200):
            if until_named.name() == "derm-decoder":
                break
            node._decoders[0].poll()
            subprocess.run(["/bin/sleep", "0.1"], check=True)
        assert set(until_named.uids()) == {account_of("derm-decoder").uid}
        assert (account_findings(place) == []) == (AS_ROOT or sandbox.landlock_version() > 0)
        until_named.kill()
        node._decoders[0].wait(10)
        assert not node.decodes()
    finally:
        node.stop()
        shutil.rmtree(node.directory, ignore_errors=True)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_one_that_systemd_knows_and_exposes_little(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    here = str(Path(sys.executable).with_name("derm-cds"))
    text = UNIT.read_text().replace("/opt/pms-derm-cds/.venv/bin/derm-cds", here)
    assert here in text
    unit.write_text(text)

    def analyze(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(shutil.which("systemd-analyze")), *arguments, str(unit)],
            capture_output=True,
            text=True,
            check=False,
        )

    # It says what it does not know, and exits with 0 all the same.
    assert [line for line in analyze("verify").stderr.splitlines() if unit.name in line] == []
    exposed = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}")
    assert exposed.returncode == 0, exposed.stdout
    assert re.search(r"^User=derm-cds$", text, re.MULTILINE)

"""What nobody else may read: secrets that are replaced or removed, and the memory of our processes."""

from __future__ import annotations

import os
from pathlib import Path
import resource
import stat
import subprocess
import sys

import pytest

from cluster.node_files import write_owner_environment, write_service_environment
from cluster.postgres import DatabaseUrls, PostgresState
from serve_app.keys.keyring import FileKeyring
from serve_app.private_files import distrust, remove_secret, replace_secret
from serve_app.settings import REPOSITORY


def _urls(password: str) -> DatabaseUrls:
    return DatabaseUrls(*(f"postgresql://{role}:{password}@/derm" for role in ("owner", "app")))


def _write_keyring(home: Path, _: str) -> None:
    """Version 1 made first, and destroyed then."""
    keyring = FileKeyring.make(home / "keys" / "keyring.json")
    if keyring.rotate() > 2:
        keyring.retire(1)


def _write_service(home: Path, password: str) -> None:
    (home / "secrets").mkdir(mode=0o700, exist_ok=True)
    (home / "secrets" / "service.env").touch(0o600)
    os.environ["DERM_TOKEN_JWKS"] = "/x" if password == "second" else ""  # and the made secret goes
    write_service_environment(home, _urls(password))


def _write_state(home: Path, password: str) -> None:
    PostgresState(5432, password, password, password).write(home / "postgres.json")


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (_write_keyring, "keys/keyring.json"),
        (_write_service, "secrets/service.env"),
        (lambda home, password: write_owner_environment(home, _urls(password)), "secrets/owner.env"),
        (_write_state, "postgres.json"),
    ],
)
def test_a_secret_that_is_replaced_is_overwritten(tmp_path: Path, monkeypatch, write, name: str) -> None:
    monkeypatch.setenv("DERM_TOKEN_JWKS", "")
    monkeypatch.delenv("DERM_TOKEN_SECRET", raising=False)
    write(tmp_path, "first")
    with (tmp_path / name).open("rb") as before:
        secret = before.read()
        assert len(secret) > 20
        write(tmp_path, "second")
        assert (tmp_path / name).read_bytes() != secret
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        # The kernel has it for us still, as whoever reads the disk would: there is nothing but zeros.
        before.seek(0)
        assert before.read() == bytes(len(secret))


def test_a_copy_by_a_hard_link_stays_and_what_does_not_change_too(tmp_path: Path) -> None:
    secret, copy = tmp_path / "secret", tmp_path / "copy"
    replace_secret(secret, b"first")
    with secret.open("rb") as before:
        replace_secret(secret, b"first")
        assert before.read() == b"first"
    copy.hardlink_to(secret)
    secret.chmod(0o400)
    replace_secret(secret, b"second")
    assert (copy.read_bytes(), secret.read_bytes()) == (b"first", b"second")
    with secret.open("rb") as gone:
        remove_secret(secret)
        assert gone.read() == bytes(6)
    remove_secret(secret)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_keyring_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch) -> None:
    """Between opening and reading it, another process may replace and overwrite the file."""
    path = tmp_path / "keys" / "keyring.json"
    FileKeyring.make(path)
    reading, elsewhere = FileKeyring(path), FileKeyring(path)
    elsewhere.rotate()
    read = Path.open

    def open_and_wait(opened: Path, *of: str):
        file = read(opened, *of)
        if opened == path and of == ("rb",):
            monkeypatch.setattr(Path, "open", read)
            elsewhere.rotate()
        return file

    monkeypatch.setattr(Path, "open", open_and_wait)
    assert reading.versions == (1, 2, 3)


@pytest.mark.parametrize(
    ("changed", "mode", "trusted"),
    [
        ("a/b/file", 0o644, True),
        ("a/b/file", 0o664, False),
        ("a/b", 0o775, False),
        ("a/b", 0o1777, True),  # nobody may rename what is root's there
        ("a", 0o775, True),  # a folder above: the group of an administrator's is usual
        ("a", 0o757, False),
        ("link", 0o755, True),
        ("link", 0o777, False),
    ],
)
def test_trust_is_in_what_nobody_else_can_change(
    tmp_path: Path, changed: str, mode: int, *, trusted: bool
) -> None:
    for folder in ("a", "a/b", "link"):
        (tmp_path / folder).mkdir(mode=0o755)
    file, link = tmp_path / "a" / "b" / "file", tmp_path / "link" / "file"
    file.touch(0o644)
    link.symlink_to(file)
    (tmp_path / changed).chmod(mode)
    said = distrust(link)
    assert said is None if trusted else f"{tmp_path / changed} may be written by other users" in said


def test_a_command_leaves_no_core_and_its_memory_to_nobody(tmp_path: Path) -> None:
    """Where core dumps are on, the kernel says that it wrote none when the process aborts."""
    program = (
        "import ctypes, os, resource, sys; from cluster import cli\n"
        f"sys.argv = ['derm-cds', 'stop', '--home', {str(tmp_path)!r}]\n"
        "assert cli.main() == 0\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3), flush=True)\n"
        "ctypes.CDLL(None).prctl(4, 1); os.abort()"  # dumpable again: the limit alone suffices
    )
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limit[1], limit[1]))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process.stdout as stdout:
            said = stdout.read()
        _, status = os.waitpid(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limit)
    assert said.splitlines()[-1] == ("(1, 1) 0" if limit[1] else "(0, 0) 0")
    assert os.WIFSIGNALED(status)
    assert not os.WCOREDUMP(status)
    assert list(tmp_path.glob("core*")) == []

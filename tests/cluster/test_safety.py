"""Each thing that makes a node unsafe, made so, and found; those of its database are in test_database_safety."""

from __future__ import annotations

import asyncio
from dataclasses import replace
import os
from pathlib import Path
import socket
import subprocess
import sys
from uuid import uuid4

import pytest

from cluster.node_files import own_database
from cluster.ports import Listener, exposed, listeners
from cluster.safety import (
    Finding,
    environment_findings,
    file_findings,
    key_findings,
    prevents_ready,
    process_findings,
)
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.settings import NodeFiles


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


@pytest.mark.parametrize(
    "path", ["keys/keyring.json", "keys/keystore.sqlite", "secrets/service.env", "secrets/owner.env"]
)
def test_a_key_that_others_may_open_is_found(tmp_path: Path, path: str) -> None:
    file = tmp_path / path
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    assert file_findings(tmp_path) == []
    file.chmod(0o640)
    (found,) = file_findings(tmp_path)
    assert f"{file} is open to other users: chmod go-rwx it" == found.advice
    file.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        assert "belongs to another user" in file_findings(tmp_path)[0].advice


def test_a_keyring_or_a_key_store_that_is_gone_is_found(own_home: Path, add_image) -> None:
    files, database = NodeFiles(own_home), own_database(own_home)

    def found(provider: str) -> list[Finding]:
        return asyncio.run(key_findings(files, database, provider=provider))

    assert found("file:") == []
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    assert found("file:") == []
    files.keyring.unlink()
    (gone,) = found("file:")
    assert (gone.name, "put its backup back" in gone.advice) == ("keyring", True)
    assert found("kms:alias/derm") == []
    add_image(uuid4(), uuid4(), b"sealed")
    (lost,) = found("kms:alias/derm")
    assert (lost.name, "derm-cds restore --keys" in lost.advice) == ("keystore", True)
    assert prevents_ready(lost, env="development")


def test_a_port_open_to_others_is_found(tmp_path: Path) -> None:
    program = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print('up', flush=True); input()"
    )
    environment = {**os.environ, "DERM_NODE": str(tmp_path)}
    for address, finding in (("127.0.0.1", []), ("0.0.0.0", ["ports"])):  # noqa: S104
        with subprocess.Popen(
            [sys.executable, "-c", program, address],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout.readline() == b"up\n"
            assert names(process_findings(tmp_path)) == finding
            process.communicate(b"\n")


def test_loopback_is_loopback_in_every_form() -> None:
    listener = Listener("x", "127.0.0.1", 1)
    inside = ["127.0.0.1", "127.0.0.53", "::1", "::ffff:127.0.0.1"]
    outside = ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1%eth0"]  # noqa: S104
    assert exposed([replace(listener, address=address) for address in inside]) == []
    assert len(exposed([replace(listener, address=address) for address in outside])) == len(outside)
    for port in (30_000, 41_234):  # an ingress replica's HTTP, and calls between deployments
        assert len(exposed([Listener("ray::ServeReplica:x", "::", port)])) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in [found.port for found in listeners({os.getpid(): "us"})]


def test_development_is_said_and_in_production_nothing_is_forgiven() -> None:
    assert environment_findings("production", weakness=None) == []
    found = environment_findings("development", weakness="made for development")
    assert names(found) == ["env", "token_secret"]
    assert not any(prevents_ready(finding, env="development") for finding in found)
    assert all(prevents_ready(finding, env="production") for finding in found)
    assert prevents_ready(Finding("fsync", ""), env="development")

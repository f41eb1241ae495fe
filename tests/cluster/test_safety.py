"""Each thing that makes a node unsafe, made so on a real server, and found."""

from __future__ import annotations

import asyncio
from dataclasses import replace
import os
from pathlib import Path
import socket
import subprocess
import sys

import asyncpg
import pytest

from cluster.listening import Listener, exposed, listeners
from cluster.safety import (
    Finding,
    access_findings,
    database_findings,
    environment_findings,
    file_findings,
    prevents_ready,
    process_findings,
)
from serve_app.records.pool import open_pool


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


@pytest.mark.parametrize(
    ("parameter", "value"), [("fsync", "off"), ("full_page_writes", "off"), ("password_encryption", "md5")]
)
async def test_a_parameter_that_loses_records_is_found(postgres, as_superuser, parameter, value) -> None:
    urls = postgres.ensure()
    pool = await open_pool(urls.app, minimum=0, maximum=1)
    connection = await asyncpg.connect(as_superuser(urls))
    try:
        await connection.execute(f"ALTER SYSTEM SET {parameter} = '{value}'")
        await connection.execute("SELECT pg_reload_conf()")
        for _ in range(50):
            found = await database_findings(pool)
            if parameter in names(found):
                break
            await asyncio.sleep(0.1)
        assert parameter in names(found)
        assert any(f"is {value}: " in finding.advice for finding in found)
        assert "data_checksums" not in names(found)
    finally:
        await connection.execute(f"ALTER SYSTEM RESET {parameter}")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        await pool.close()


async def test_our_own_pg_hba_is_safe_and_a_trust_line_is_found(postgres, as_superuser) -> None:
    dsn = as_superuser(postgres.ensure())
    assert await access_findings(dsn) == []
    hba = postgres.directory / "etc" / "pg_hba.conf"
    before = hba.read_text()
    try:
        hba.write_text(f"{before}host all all 127.0.0.2/32 trust\n")
        (found,) = await access_findings(dsn)
        assert "says trust" in found.advice
    finally:
        hba.write_text(before)


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
    assert exposed([Listener("ray::ServeReplica:x", "::", 1)]) == []
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in [found.port for found in listeners({os.getpid(): "us"})]


def test_development_is_said_and_in_production_nothing_is_forgiven() -> None:
    assert environment_findings("production", weakness=None) == []
    found = environment_findings("development", weakness="made for development")
    assert names(found) == ["env", "token_secret"]
    assert not any(prevents_ready(finding, env="development") for finding in found)
    assert all(prevents_ready(finding, env="production") for finding in found)
    assert prevents_ready(Finding("fsync", ""), env="development")

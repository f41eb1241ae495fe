"""Each thing that makes a node unsafe, made so, and found; those of its database are in test_database_safety."""

from __future__ import annotations

import asyncio
from dataclasses import replace
import os
from pathlib import Path
from secrets import token_hex
import socket
import subprocess
import sys
from uuid import uuid4

import pytest

from cluster.node_files import own_database
from cluster.ports import Listener, exposed, listeners
from cluster.prepare import prepare
from cluster.safety import (
    Finding,
    all_findings,
    environment_findings,
    file_findings,
    key_findings,
    prevents_ready,
    process_findings,
    trust_findings,
)
from serve_app.domain.errors import DermError, InvalidSetting
from serve_app.http.services import open_services
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.settings import NodeFiles, load_settings


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


@pytest.mark.parametrize(
    "name",
    ["TOKEN_JWKS", "VAULT_TOKEN_FILE", "PMS_CA_FILE", "PMS_TOKEN_FILE", "DATABASE_URL", "SSL_CERT_FILE"],
)
async def test_production_does_not_start_on_trust_that_others_can_change(own_home, monkeypatch, name) -> None:
    """Whoever can write a set of keys, certificates to trust or a token says whom this node believes."""
    file = own_home / "trust" / "file"
    file.parent.mkdir(mode=0o755)
    file.write_text("")
    file.chmod(0o640)
    variable = name if name.startswith("SSL") else f"DERM_{name}"
    url = f"{os.environ['DERM_DATABASE_URL']}&sslrootcert={file}" if name == "DATABASE_URL" else str(file)
    monkeypatch.setenv(variable, url.replace("&", "?", "?" not in url))
    monkeypatch.setenv("DERM_ENV", "production")
    monkeypatch.setenv("DERM_TOKEN_SECRET", token_hex(32))
    monkeypatch.setenv("DERM_HOME", str(own_home))
    if name == "TOKEN_JWKS":
        monkeypatch.delenv("DERM_TOKEN_SECRET")

    async def found() -> list[str]:
        load_settings.cache_clear()
        settings, urls = load_settings(), own_database(own_home)
        said = [finding.advice for finding in trust_findings(settings, urls)]
        everything = await all_findings(own_home, None, settings, own=True)
        assert "trust_file" in names(everything) or not said
        if said:
            with pytest.raises(DermError, match="Refused in production") as refused:
                await prepare(settings, model=None)
            assert said[0] in str(refused.value)
            with pytest.raises(InvalidSetting, match="Refused in production"):
                async with open_services(settings, None):
                    pass
        return said

    assert await found() == []
    for changed, mode, right in ((file, 0o660, 0o640), (file, 0o602, 0o640), (file.parent, 0o775, 0o755)):
        changed.chmod(mode)
        (said,) = await found()
        assert said.endswith(f"{changed} may be written by other users: chmod go-w it")
        changed.chmod(right)
    if os.geteuid() == 0:
        os.chown(file, 65534, 65534)
        (said,) = await found()
        assert f"{file} belongs to another user" in said
        os.chown(file, 0, 0)
    file.chmod(0o644)
    assert len(await found()) == ("TOKEN_FILE" in name)  # a secret
    file.unlink()
    assert await found() == []  # whoever needs it says so
    assert not prevents_ready(Finding("trust_file", ""), env="development")


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

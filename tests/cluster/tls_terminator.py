"""cluster/on_prem/tls.cfg in a HAProxy of its own, with a certificate made for the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
import os
from pathlib import Path
import shutil
import socket
import subprocess
import time

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
import pytest

from cluster.ports import choose_port
from cluster.ray_node import ray_environment
from serve_app.settings import REPOSITORY

CONFIGURATION = REPOSITORY / "cluster" / "on_prem" / "tls.cfg"


@dataclass(frozen=True)
class Terminator:
    """Where it listens, the certificate to trust, and the file it logs to."""

    port: int
    authority: Path
    log: Path

    def said(self, text: str, count: int) -> str:
        """Return the log once it has `text` that often; a line follows its answer, which may be here first."""
        deadline = time.monotonic() + 30
        while (said := self.log.read_text()).count(text) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return said


def haproxy(folder: Path) -> str:
    """HAProxy with TLS, as it comes with Ray or from the system; the test is skipped without one."""
    program = shutil.which(ray_environment(folder / "home", folder)["DERM_HAPROXY"])
    if program is None:
        pytest.skip("no haproxy here")
    said = subprocess.run([program, "-vv"], check=True, capture_output=True, text=True).stdout
    if "USE_OPENSSL=1" not in said:
        pytest.skip("this haproxy has no TLS")
    return program


@contextmanager
def terminator(folder: Path, *, api: int) -> Iterator[Terminator]:
    """Run the terminator in front of the API on that port of this machine."""
    program, port, log = haproxy(folder), choose_port(), folder / "tls.log"
    certificate = _make_certificate(folder)
    environment = {
        **os.environ,
        "TLS_CERTIFICATE": str(folder / "api.pem"),
        "TLS_BIND": f"127.0.0.1:{port}",
        "TLS_API": f"127.0.0.1:{api}",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [program, "-db", "-f", CONFIGURATION], env=environment, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 30
        while not _listens(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield Terminator(port, certificate, log)
    finally:
        process.terminate()
        process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _make_certificate(folder: Path) -> Path:
    """Write api.pem (certificate and key) and return the certificate alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "derm-cds")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    both = folder / "api.pem"
    both.touch(mode=0o600)
    both.write_bytes(public + private)
    (folder / "authority.pem").write_bytes(public)
    return folder / "authority.pem"

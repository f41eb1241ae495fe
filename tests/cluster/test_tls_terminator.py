"""The TLS terminator that the documentation names: what it lets through, what it refuses, what it logs."""

from __future__ import annotations

from collections.abc import Iterator
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import secrets
import socket
import ssl
import struct
from threading import Thread

import httpx
import pytest

from tests.cluster.tls_terminator import Terminator, terminator

_HANDSHAKE, _ALERT = 22, 21
_PROTOCOL_VERSION = 70  # the alert of RFC 5246 and RFC 8446 for a version that is not spoken


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
    headers = {name.lower(): value for name, value in told["headers"].items()}
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert "10.9.9.9" not in str(headers)


def test_pages_of_the_node_itself_stay_on_it(tls: Terminator) -> None:
    with httpx.Client(verify=_trusting(tls)) as client:
        assert client.post(f"https://127.0.0.1:{tls.port}/-/routes", content=b"").status_code == 404


def test_plain_http_is_refused(tls: Terminator) -> None:
    with socket.create_connection(("127.0.0.1", tls.port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            said = client.recv(4096)
        except ConnectionResetError:
            said = b""
    assert b"HTTP/" not in said


@pytest.mark.parametrize(("minor", "answered"), [(1, "refused"), (2, "refused"), (3, "spoken")])
def test_nothing_older_than_tls_1_2_is_spoken(tls: Terminator, minor: int, answered: str) -> None:
    """A ClientHello of TLS 1.0, 1.1 and 1.2, by hand: a library of today may refuse to send the old ones."""
    with socket.create_connection(("127.0.0.1", tls.port), timeout=10) as client:
        client.sendall(_client_hello(minor))
        kind, _, _, _ = struct.unpack(">BBBH", client.recv(5, socket.MSG_WAITALL))
        body = client.recv(2, socket.MSG_WAITALL)
    if answered == "refused":
        assert (kind, body[1]) == (_ALERT, _PROTOCOL_VERSION)
    else:
        assert kind == _HANDSHAKE


def _client_hello(minor: int) -> bytes:
    """A ClientHello of TLS 1.<minor - 1> with suites and extensions that every version knows."""
    suites = struct.pack(">4H", 0xC02B, 0xC009, 0xC00A, 0x002F)
    groups = struct.pack(">HHHH", 10, 4, 2, 23)
    points = struct.pack(">HHBB", 11, 2, 1, 0)
    signatures = struct.pack(">HHHHH", 13, 6, 4, 0x0403, 0x0401)
    extensions = groups + points + signatures
    hello = bytes([3, minor]) + secrets.token_bytes(32) + b"\0"
    hello += struct.pack(">H", len(suites)) + suites + b"\1\0"
    hello += struct.pack(">H", len(extensions)) + extensions
    handshake = b"\1" + len(hello).to_bytes(3, "big") + hello
    return struct.pack(">BBBH", _HANDSHAKE, 3, 1, len(handshake)) + handshake


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

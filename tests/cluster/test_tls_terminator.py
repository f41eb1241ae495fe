"""The TLS terminator that the documentation names: what it lets through, what it refuses, what it logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
import hashlib
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler
import json
import secrets
import socket
import ssl

import httpx
import pytest

from cluster.ports import choose_port
from tests.cluster.tls_terminator import CONFIGURATION, Terminator, terminator
from tests.http_server import serving


class _Api(BaseHTTPRequestHandler):
    """Answers with what arrived: headers, and the body's digest."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = json.dumps({"headers": headers, "sha256": hashlib.sha256(body).hexdigest()}).encode()
        self.send_response(201)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Iterator[Terminator]:
    with serving(_Api) as port, terminator(tmp_path_factory.mktemp("tls"), api=port) as tls:
        yield tls


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_an_upload_arrives_whole_and_the_log_has_no_path_or_query(
    tls: Terminator, version: ssl.TLSVersion
) -> None:
    assert "ssl-min-ver TLSv1.2" in CONFIGURATION.read_text()  # a library of today may refuse to try older
    image, marked, before = secrets.token_bytes(1_000_000), secrets.token_hex(6), tls.log.read_text()
    claimed = {"X-Forwarded-For": "10.9.9.9", "Forwarded": "for=10.9.9.9", "X-Forwarded-Proto": "http"}
    context = ssl.create_default_context(cafile=str(tls.authority))
    context.minimum_version = context.maximum_version = version
    with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{tls.port}", timeout=60) as client:
        query = {"patient_id": marked}
        answer = client.post(f"/api/{marked}", params=query, headers=claimed, content=image)
        for spelt in ("/-/routes", "/%2d/routes", "/-%2froutes", "/%2D%2Froutes"):
            with closing(HTTPSConnection("127.0.0.1", tls.port, context=context)) as raw:
                raw.request("POST", spelt, b"")
                assert raw.getresponse().status == 404, spelt
    assert answer.status_code == 201
    assert "max-age" in answer.headers["strict-transport-security"]
    assert answer.json()["sha256"] == hashlib.sha256(image).hexdigest()
    told = answer.json()["headers"]
    assert (told["x-forwarded-for"], told["x-forwarded-proto"]) == ("127.0.0.1", "https")
    assert "10.9.9.9" not in str(told)  # the caller's own word about its address
    count = before.count(" POST 201 ") + 1
    said = tls.said(" POST 201 ", count)
    assert said.count(" POST 201 ") == count
    assert not any(private in said for private in (marked, "patient_id"))


def test_every_answer_of_its_own_is_a_problem_document(tmp_path) -> None:
    with terminator(tmp_path, api=choose_port()) as tls:  # where nobody listens
        context = ssl.create_default_context(cafile=str(tls.authority))
        with httpx.Client(verify=context, base_url=f"https://127.0.0.1:{tls.port}", timeout=60) as client:
            answers = [
                (client.get("/healthz"), 503, "unavailable"),
                (client.get("/-/routes"), 404, "not_found"),
            ]
    for found, status, code in answers:
        body = found.json()
        assert found.headers["content-type"] == "application/problem+json"
        assert (found.status_code, body["status"], body["code"]) == (status, status, code)
        assert body["request_id"] == found.headers["x-request-id"]


def test_plain_http_is_refused(tls: Terminator) -> None:
    with socket.create_connection(("127.0.0.1", tls.port), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            said = client.recv(4096)
        except ConnectionResetError:
            said = b""
    assert b"HTTP/" not in said

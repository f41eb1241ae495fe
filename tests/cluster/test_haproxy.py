"""HAProxy's start script: Ray's own template, on loopback, and what HAProxy answers itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import os
from pathlib import Path
import re
import select
import socket
import subprocess
from threading import Thread
import time
from typing import Any
import warnings

import httpx
import pytest

import cluster
from cluster.ports import choose_ports
from cluster.ray_node import SERVE_ENVIRONMENT
from tests.cluster.tls_terminator import HAPROXY, running

_SCRIPT = Path(cluster.__file__).with_name("haproxy")


@pytest.fixture(scope="module")
def template() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private import haproxy_templates
    text = "\n".join(value for value in vars(haproxy_templates).values() if isinstance(value, str))
    for name, value in {"metrics_port": "9101", "stats_port": "8404", "socket_path": "/run/s"}.items():
        text = text.replace(f"{{{{ config.{name} }}}}", value)
    return text


def _rewritten(folder: Path, text: str) -> str:
    """What the start script makes of a configuration; HAProxy itself is not started."""
    config = folder / "with a space.cfg"
    config.write_text(text)
    command = [_SCRIPT, "-db", "-f", config, "-sf", "1"]
    done = subprocess.run(
        command, env=os.environ | {"DERM_HAPROXY": "/bin/echo"}, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"-db -f {config} -sf 1"  # arguments are HAProxy's
    return config.read_text()


def test_every_setting_of_serve_is_one_that_this_ray_reads() -> None:
    """A name that is not read would be no setting: HAProxy's time limits would be an hour and none again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve._private import constants
    source = Path(constants.__file__).read_text()
    assert [name for name in SERVE_ENVIRONMENT if name not in source] == []


def test_what_ray_opens_to_everyone_is_closed_and_another_configuration_left_alone(
    tmp_path, template
) -> None:
    """Metrics, statistics, the applications' names and the admin socket; each line is in Ray's template still."""
    written = _rewritten(tmp_path, template)
    lines = [each.strip() for each in written.splitlines()]
    for line, rewritten in (
        (r"bind :9101", "bind 127.0.0.1:9101"),
        (r"bind \*:8404", "bind 127.0.0.1:8404"),
        (r"http-request return .* if routes", "http-request return status 404 default-errorfiles if routes"),
        (
            r"http-request return status 404 .* not found\..*",
            "http-request return status 503 default-errorfiles",
        ),
        (
            r'http-request return status 503 content-type text/plain string "Service Unavailable" if healthcheck',
            "http-request return status 503 default-errorfiles if healthcheck",
        ),
        (r"stats socket /run/s mode 666 .*", "stats socket /run/s mode 600 level admin expose-fd listeners"),
    ):
        assert len(re.findall(rf"^ *{line} *$", template, re.MULTILINE)) == 1
        assert lines.count(rewritten) == 1
        assert not re.search(rf"^ *{line} *$", written.replace(rewritten, ""), re.MULTILINE)
    for line, count in (
        (r" *errorfile 50[234] ", 3),
        (r"frontend http_frontend *$", 1),
        (r" *tune\.bufsize ", 2),  # either or, of a condition
    ):
        assert len(re.findall(f"^{line}", template, re.MULTILINE)) == count  # what the tests below rest on
    assert _rewritten(tmp_path, "global\n") == "global\n"


@dataclass
class Proxy:
    """HAProxy as the start script starts it, in front of one replica, which is the test's."""

    front: int
    back: int

    def get(self, path: str = "/", **options: Any) -> httpx.Response:
        return httpx.request("GET", f"http://127.0.0.1:{self.front}{path}", **options)

    def pass_on(self, lines: bytes) -> bytes:
        """Send header lines through it: what the replica receives."""
        with (
            socket.create_server(("127.0.0.1", self.back)) as replica,
            socket.create_connection(("127.0.0.1", self.front), timeout=5) as client,
        ):
            replica.settimeout(5)
            client.sendall(b"GET /api/ HTTP/1.1\r\nHost: derm\r\n" + lines + b"\r\n")
            connection, _ = replica.accept()
            with connection:
                received = b""
                while not received.endswith(b"\r\n\r\n"):
                    received += connection.recv(100_000)
                return received


@pytest.fixture(scope="module")
def proxy(tmp_path_factory) -> Iterator[Proxy]:
    front, back = choose_ports(2)
    folder = tmp_path_factory.mktemp("haproxy")
    (folder / "cfg").write_text(f"""
global
    tune.bufsize {SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]}
defaults
    mode http
    timeout client {SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]}s
    timeout connect 1s
    timeout server 500ms
    errorfile 502 /500.http
    errorfile 503 /500.http
    errorfile 504 /500.http
frontend http_frontend
    bind 127.0.0.1:{front}
    acl healthcheck path -i /-/healthz
    http-request return status 503 content-type text/plain string "DRAINING" if healthcheck
    acl routes path -i /-/routes
    http-request return status 200 content-type application/json string "names" if routes
    acl is_triage path_beg /api/
    use_backend back if is_triage
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path '%[path]' not found. Ping http://.../-/routes for available routes."
backend back
    server replica 127.0.0.1:{back}
""")
    command = [_SCRIPT, "-db", "-f", folder / "cfg"]
    with running(command, front, log=folder / "log", DERM_HAPROXY=HAPROXY):
        yield Proxy(front, back)


#: As uvicorn answers before any application is asked.
_PLAIN_400 = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\n\r\nInvalid HTTP request received."
)


def test_every_answer_of_its_own_is_a_problem_document(proxy: Proxy) -> None:
    answers = [
        (proxy.get("/api/"), 503, "unavailable"),  # no replica
        (proxy.get("/"), 503, "unavailable"),  # no application
        (proxy.get("/-/healthz"), 503, "unavailable"),
        (proxy.get("/-/routes"), 404, "not_found"),
    ]
    with socket.create_server(("127.0.0.1", proxy.back)) as replica:

        def answer(said: bytes) -> None:
            connection, _ = replica.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(said)

        # It dies with the request, or its server does not know what it is asked.
        for said, status, code in ((b"", 502, "interrupted"), (_PLAIN_400, 400, "bad_request")):
            thread = Thread(target=answer, args=(said,))
            thread.start()
            answers.append((proxy.get("/api/"), status, code))
            thread.join()
        answers.append((proxy.get("/api/"), 504, "interrupted"))
    for found, status, code in answers:
        body = found.json()
        assert found.headers["content-type"] == "application/problem+json"
        assert (found.status_code, body["status"], body["code"]) == (status, status, code)
        assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
        assert body["request_id"] == found.headers["x-request-id"]
        assert (int(found.headers.get("retry-after", "0")) > 0) is (status >= 500)


def test_a_header_that_trickles_in_keeps_no_place(proxy: Proxy) -> None:
    """Nor does one who says nothing at all; a connection that is kept for the next request may wait longer."""
    with (
        socket.create_connection(("127.0.0.1", proxy.front), timeout=5) as trickling,
        socket.create_connection(("127.0.0.1", proxy.front), timeout=15) as silent,
        socket.create_connection(("127.0.0.1", proxy.front), timeout=5) as kept,
    ):
        began = time.monotonic()
        kept.sendall(b"GET /-/routes HTTP/1.1\r\nHost: derm\r\n\r\n")
        assert b" 404 " in kept.recv(10_000)
        trickling.sendall(b"GET /api/ HTTP/1.1\r\nHost: derm\r\n")
        while time.monotonic() - began < 14 and not select.select([trickling], [], [], 0.5)[0]:
            trickling.sendall(b"X-A: a\r\n")
        assert b" 408 " in trickling.recv(1000)
        assert 9 < time.monotonic() - began < 13
        assert b" 200 " not in silent.recv(1000)
        kept.sendall(b"GET /-/routes HTTP/1.1\r\nHost: derm\r\n\r\n")
        assert b" 404 " in kept.recv(10_000)


@pytest.mark.parametrize(
    "sent", [b"X-A: " + b"a" * 40_000 + b"\r\n", b"X-A: a\r\n" * 500], ids=["large", "many"]
)
def test_large_and_many_headers_go_on(proxy: Proxy, sent: bytes) -> None:
    """The service itself has words for what is too large or too many."""
    assert sent.lower() in proxy.pass_on(sent).lower()


def test_it_tells_who_called_and_asks_for_nothing_but_http(proxy: Proxy) -> None:
    received = proxy.pass_on(
        b"X-Derm-Peer: 10.1.2.3\r\nx-derm-peer: 10.1.2.4\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    ).lower()
    assert [line for line in received.split(b"\r\n") if b"peer" in line] == [b"x-derm-peer: 127.0.0.1"]
    assert b"upgrade:" not in received

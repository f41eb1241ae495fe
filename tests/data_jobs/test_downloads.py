"""Downloads from a real server that would lead them elsewhere, or drown them."""

from __future__ import annotations

from contextlib import suppress
import gzip
from http.server import BaseHTTPRequestHandler
import time

import httpx
import pytest

from data_jobs import downloads
from data_jobs.downloads import Bounds, NotTaken, TotalReached
from tests.http_server import serving

ENDLESS = bytes(1 << 16)
SECRET = b"what only this machine can reach"


class Handler(BaseHTTPRequestHandler):
    seen: list[str]
    #: Bytes of endless bodies that went out.
    sent: list[int]
    inner: int

    def do_GET(self):
        self.seen.append(self.path)
        leads_to = {
            "/inner": f"http://127.0.0.1:{self.inner}/secret",
            "/name": f"https://localhost:{self.inner}/secret",
            "/link-local": "https://169.254.169.254/latest/meta-data",
            "/other": "https://example.invalid/file",
            "/file": "file:///etc/hostname",
            "/here": "/small",
            "/circle": "/circle",
            "/endless-redirect": "/small",
        }.get(self.path)
        headers = {"Location": leads_to} if leads_to else {}
        if self.path == "/stated":
            headers["Content-Length"] = str(10**12)
        if self.path == "/packed":
            headers["Content-Encoding"] = "gzip"
        self.send_response(302 if leads_to else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):
            self.send_body()

    def send_body(self):
        if self.path in {"/stated", "/endless", "/endless-redirect"}:
            for _ in range(4000):
                self.wfile.write(ENDLESS)
                self.sent.append(len(ENDLESS))
        elif self.path == "/trickle":
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.05)
        else:
            self.wfile.write(gzip.compress(bytes(10**6)) if self.path == "/packed" else bytes(1000))


class Inner(BaseHTTPRequestHandler):
    seen: list[str]

    def do_GET(self):
        self.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SECRET)


@pytest.fixture
def inner():
    Inner.seen = []
    with serving(Inner) as port:
        yield port


@pytest.fixture
def base(inner):
    Handler.seen, Handler.sent, Handler.inner = [], [], inner
    with serving(Handler) as port:
        yield f"http://127.0.0.1:{port}/"


def download(bounds: Bounds, base: str, path: str, max_bytes: int = 10**6) -> bytes:
    with httpx.Client(base_url=base, timeout=5) as client, bounds.open(client, path) as response:
        return b"".join(bounds.read(response, max_bytes))


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        ("inner", "insecure place"),
        ("file", "insecure place"),
        ("other", "host not allowed"),
        ("link-local", "private address"),
        ("name", "private address"),
        ("circle", "redirections"),
    ],
)
def test_a_redirection_leads_nowhere_but_to_a_listed_host_on_the_internet(base, path, cause):
    with pytest.raises(NotTaken) as refused:
        download(Bounds(base, ["localhost", "169.254.169.254"]), base, path)
    assert refused.value.cause == cause
    assert Inner.seen == []


def test_the_place_that_was_named_may_be_anywhere_and_lead_about_itself(base):
    assert download(Bounds(base), base, "here") == bytes(1000)


@pytest.mark.parametrize("url", ["http://archive.example/x", "http://archive.example:443/x"])
def test_https_is_not_left_for_http(url):
    with pytest.raises(NotTaken, match="only https"):
        Bounds("https://archive.example/", ["archive.example"]).check(httpx.URL(url))


@pytest.mark.parametrize("name", ["archive.example.evil.example", "notarchive.example", "archive.example."])
def test_a_name_that_only_looks_like_a_listed_one_is_another(name):
    bounds = Bounds("https://elsewhere.example/", ["archive.example"])
    bounds.check(httpx.URL("https://cdn.archive.example/x"))
    with pytest.raises(NotTaken, match="not allowed"):
        bounds.check(httpx.URL(f"https://{name}/x"))


@pytest.mark.parametrize(
    "address",
    [
        "127.1",
        "10.0.0.1",
        "192.168.1.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[fd00::1]",
        "[2002:7f00:1::]",
        "0.0.0.1",
    ],
)
def test_an_address_of_this_machine_or_of_a_private_network_is_none_however_it_is_written(address):
    url = httpx.URL(f"https://{address}/x")
    with pytest.raises(NotTaken, match="not on the internet"):
        Bounds("https://archive.example/", [url.host]).check(url)


def test_a_file_that_says_that_it_is_too_large_is_not_read(base):
    with pytest.raises(NotTaken, match=r"/stated is larger than 1000000 bytes"):
        download(Bounds(base), base, "stated")


@pytest.mark.parametrize("path", ["endless", "stated"])
def test_a_file_without_an_end_is_given_up_at_the_limit(base, path):
    with pytest.raises(NotTaken, match="larger than"):
        download(Bounds(base), base, path)
    # What lies in the sockets' buffers, beside what was read.
    time.sleep(0.2)
    assert sum(Handler.sent) < 20e6


def test_the_body_of_a_redirection_is_not_read(base):
    assert download(Bounds(base), base, "endless-redirect") == bytes(1000)
    assert sum(Handler.sent) < 20e6


def test_a_packed_answer_is_not_unpacked(base):
    with pytest.raises(NotTaken, match="packed"):
        download(Bounds(base), base, "packed")


def test_a_body_that_trickles_has_an_end(base, monkeypatch):
    monkeypatch.setattr(downloads, "PATIENCE_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(httpx.ReadTimeout, match="too slowly"):
        download(Bounds(base), base, "trickle")
    assert time.monotonic() - begun < 3


def test_all_downloads_together_have_a_limit(base):
    bounds = Bounds(base, max_total_bytes=2500)
    for _ in range(2):
        download(bounds, base, "small")
    with pytest.raises(TotalReached, match="more than 2500"):
        download(bounds, base, "small")

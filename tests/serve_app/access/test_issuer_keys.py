"""Tokens signed with an issuer's keys, which a small issuer of our own publishes and rotates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import socket
import threading
import time
from typing import Any

from joserfc import jwt
from joserfc.jwk import Key, OctKey, RSAKey
import pytest

from serve_app.access import tokens
from serve_app.access.tokens import (
    PUBLIC_ALGORITHMS,
    IssuerKeys,
    KeySetRefused,
    PublicKeyVerifier,
    read_key_set,
)
from serve_app.domain.errors import IssuerKeysUnavailable, Unauthenticated
from tests.serve_app.conftest import Clock

pytestmark = pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
ISSUER, AUDIENCE = "https://pms.example", "derm-cds"
#: What the issuer may take here, seconds.
ANSWER_S = 2.0


def make_key(algorithm: str, kid: str | None) -> Key:
    kind, curve = PUBLIC_ALGORITHMS[algorithm]
    return kind.generate_key(curve or 2048, {"kid": kid} if kid else None)


def sign(key: Key, algorithm: str, *, header: dict[str, Any] | None = None, **changed: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "dr-1", "roles": ["clinician"], "exp": time.time() + 600}
    kid = {"kid": key.get("kid")} if key.get("kid") else {}
    header = {"alg": algorithm, **kid, **(header or {})}
    return jwt.encode(header, {**claims, **changed}, key, algorithms=[algorithm])


def published(*keys: Key) -> bytes:
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


@dataclass
class Issuer:
    """An HTTP server that publishes `body`."""

    url: str
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    trickle_s: float = 0.0


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked += 1
            self.send_response(found.status)
            for name, value in found.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(found.body)))
            self.end_headers()
            with suppress(OSError):  # whoever asks may have gone
                for byte in found.body if found.trickle_s else ():
                    self.wfile.write(bytes([byte]))
                    time.sleep(found.trickle_s)
                self.wfile.write(b"" if found.trickle_s else found.body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Issuer(f"http://127.0.0.1:{server.server_port}/jwks.json")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "ANSWER_S", ANSWER_S)


@contextmanager
def within(share: float) -> Iterator[None]:
    """What is done meanwhile takes no longer than this share of an issuer's time."""
    since = time.monotonic()
    yield
    assert time.monotonic() - since < share * ANSWER_S


def verifier(
    source: str, *, algorithms: tuple[str, ...] = tuple(PUBLIC_ALGORITHMS), clock: Clock | None = None
) -> PublicKeyVerifier:
    keys = IssuerKeys(source, clock=clock or Clock())
    return PublicKeyVerifier(keys, ISSUER, AUDIENCE, algorithms)


async def settled(found: PublicKeyVerifier) -> None:
    """Wait until the request for keys that is under way in the background has ended."""
    if found._keys._refresh is not None:
        await asyncio.wait({found._keys._refresh})


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that lets everybody connect and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listening:
        yield listening


def url_of(listening: socket.socket) -> str:
    return f"http://127.0.0.1:{listening.getsockname()[1]}/jwks.json"


@pytest.mark.parametrize("age", [700, 80_000])
async def test_nobody_waits_for_an_issuer_that_never_answers(issuer, silent, age: float) -> None:
    key, stranger, clock = make_key("ES256", "a"), make_key("ES256", "b"), Clock()
    issuer.body = published(key)
    found = verifier(issuer.url, clock=clock)
    token = sign(key, "ES256")
    assert await found.identify(token)
    found._keys._source = url_of(silent)
    clock.now += age
    with within(0.8):
        await found.identify(token)  # may wait a moment where the keys are old
    # One with an unknown key waits for the issuer; nobody waits with it
    unknown = asyncio.create_task(found.identify(sign(stranger, "ES256")))
    with within(0.5):
        for _ in range(20):
            assert await found.identify(token)
    with within(2.5), pytest.raises(Unauthenticated):
        await unknown
    # and not again before the interval is over
    with within(0.5), pytest.raises(Unauthenticated):
        await found.identify(sign(stranger, "ES256"))


async def test_without_a_key_that_is_trusted_all_wait_for_one_answer_and_no_longer(silent) -> None:
    found = verifier(url_of(silent))
    token = sign(make_key("ES256", "a"), "ES256")
    with within(3):
        answers = await asyncio.gather(*(found.identify(token) for _ in range(20)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {IssuerKeysUnavailable}
    silent.setblocking(False)  # noqa: FBT003 - the standard library's own
    with closing(silent.accept()[0]), pytest.raises(BlockingIOError):
        silent.accept()  # 20 callers, one connection


async def test_an_issuer_that_trickles_is_not_listened_to_for_ever(issuer: Issuer) -> None:
    issuer.trickle_s, issuer.body = ANSWER_S / 4, b" " * 40
    with within(2), pytest.raises(IssuerKeysUnavailable):
        await verifier(issuer.url).identify(sign(make_key("ES256", "a"), "ES256"))


@pytest.mark.parametrize("algorithm", PUBLIC_ALGORITHMS)
@pytest.mark.parametrize("kid", ["2026-11", None])
async def test_each_algorithm_gets_in_and_keys_may_come_from_a_file(tmp_path, algorithm, kid) -> None:
    key, path = make_key(algorithm, kid), tmp_path / "jwks.json"
    path.write_bytes(published(key))
    found = verifier(f"file://{path}" if kid else str(path))
    principal = await found.identify(sign(key, algorithm, jti="7"))
    assert (principal.subject, principal.roles, principal.token_id) == ("dr-1", {"clinician"}, "7")


async def test_a_rotated_key_is_found_at_once_and_a_withdrawn_one_refused_in_time(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, clock = make_key("ES256", "old"), make_key("ES256", "new"), Clock()
    issuer.body = published(old)
    found = verifier(issuer.url, clock=clock)
    assert await found.identify(sign(old, "ES256"))
    clock.now += 60
    issuer.body = published(new)
    assert await found.identify(sign(new, "ES256"))
    assert issuer.asked == 2
    with pytest.raises(Unauthenticated):
        await found.identify(sign(old, "ES256"))
    # By age, when nobody brings an unknown key: asked for in the background
    third = make_key("ES256", "third")
    issuer.body = published(third)
    assert await found.identify(sign(new, "ES256"))
    clock.now += 601
    assert await found.identify(sign(new, "ES256"))
    await settled(found)
    with pytest.raises(Unauthenticated):
        await found.identify(sign(new, "ES256"))
    # Where nobody asked for long, the first to ask is not served from what is twice as old
    monkeypatch.setattr(tokens, "ANSWER_S", 60)  # an issuer as slow as this machine may be is waited for
    issuer.body = published(old)
    clock.now += 1201
    with pytest.raises(Unauthenticated):
        await found.identify(sign(third, "ES256"))


async def test_unknown_keys_cost_the_issuer_one_request_an_interval(issuer: Issuer) -> None:
    key, stranger, clock = make_key("ES256", "a"), make_key("ES256", "b"), Clock()
    issuer.body = published(key)
    found = verifier(issuer.url, clock=clock)
    for asked in (1, 2):
        for _ in range(5):
            with pytest.raises(Unauthenticated):
                await found.identify(sign(stranger, "ES256"))
        assert issuer.asked == asked
        clock.now += 31


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 500},
        {"status": 302, "headers": {"Location": "/other.json"}},
        {"body": b"<html>"},
        {"body": b" " * (tokens.MAX_BYTES + 1)},
        {},
    ],
    ids=["500", "redirect", "garbage", "huge", "down"],
)
async def test_an_issuer_in_trouble_is_outlived_but_not_for_ever(issuer: Issuer, fault: dict) -> None:
    key, clock = make_key("ES256", "a"), Clock()
    issuer.body = published(key)
    found = verifier(issuer.url, clock=clock)
    token = sign(key, "ES256")
    assert await found.identify(token)
    vars(issuer).update(fault)
    if not fault:
        found._keys._source = "http://127.0.0.1:9/jwks.json"
    clock.now += 3600
    assert await found.identify(token)
    await settled(found)
    clock.now += 86_400
    with pytest.raises(IssuerKeysUnavailable):
        await found.identify(token)


async def test_algorithms_are_from_the_allow_list_and_fit_the_key(issuer: Issuer) -> None:
    rsa, ec = make_key("RS256", "rsa"), make_key("ES256", "ec")
    issuer.body = published(rsa, ec)
    only_ec = verifier(issuer.url, algorithms=("ES256",))
    assert await only_ec.identify(sign(ec, "ES256"))
    confused = OctKey.import_key(json.dumps(rsa.as_dict(private=False)))
    forged = [
        sign(rsa, "RS256"),
        sign(ec, "ES256", header={"kid": "rsa"}),
        sign(OctKey.import_key("x" * 64), "HS256", header={"kid": "ec"}),
        sign(confused, "HS256", header={"kid": "rsa"}),
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJkciJ9.x",
        sign(ec, "ES256", header={"jwk": ec.as_dict(private=False), "kid": "other"}),
        sign(make_key("ES256", "ec"), "ES256"),
        sign(ec, "ES256", exp=time.time() - 60),
    ]
    for token in forged:
        with pytest.raises(Unauthenticated):
            await only_ec.identify(token)


def test_an_allow_list_that_makes_no_sense_is_refused() -> None:
    for algorithms in ((), ("none",), ("HS256",), ("RS256", "HS256"), ("RS512",)):
        with pytest.raises(ValueError, match="Algorithms"):
            verifier("/nowhere", algorithms=algorithms)


def test_a_set_is_read_strictly() -> None:
    good = make_key("ES256", "a")
    public = good.as_dict(private=False)
    weak = RSAKey.generate_key(1024, {"kid": "weak"}).as_dict(private=False)
    others = [
        {"kty": "PQC", "kid": "later"},
        {**public, "kid": "enc", "use": "enc"},
        {**public, "kid": "ops", "key_ops": ["sign"]},
        weak,
        {"kty": "RSA", "n": "AA"},
        {**public, "kid": 7},
    ]
    (found,) = read_key_set(json.dumps({"keys": [*others, public]}).encode())
    assert found.get("kid") == "a"
    refused: list[Any] = [
        *(b"", b"null", b"[]", b"7", b'{"keys": 7}', b'{"keys": [7]}', b'{"keys": []}', b"[" * 90_000),
        {"keys": others},
        {"keys": [public, public]},
        {"keys": [public, good.as_dict(private=True)]},
        {"keys": [public, {"kty": "oct", "k": "AAAA"}]},
    ]
    for content in refused:
        with pytest.raises(KeySetRefused):
            read_key_set(content if isinstance(content, bytes) else json.dumps(content).encode())

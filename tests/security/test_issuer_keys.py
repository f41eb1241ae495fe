"""Tokens signed with an issuer's keys, which a small issuer of our own publishes and rotates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import threading
import time
from typing import Any
import warnings

from joserfc import jwt
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, Key, OctKey, OKPKey, RSAKey
import pytest

from serve_app.domain.errors import IssuerKeysUnavailable, Unauthenticated
from serve_app.security.issuer_keys import PUBLIC_ALGORITHMS, Freshness, IssuerKeys, PublicKeyVerifier
from serve_app.security.key_set import MAX_BYTES, KeySetRefused, read_key_set

ISSUER, AUDIENCE = "https://pms.example", "derm-cds"
KINDS = tuple(set(PUBLIC_ALGORITHMS.values()))


def make_key(algorithm: str, kid: str | None) -> Key:
    named = {"kid": kid} if kid else None
    if algorithm == "RS256":
        return RSAKey.generate_key(2048, named)
    return (
        ECKey.generate_key("P-256", named) if algorithm == "ES256" else OKPKey.generate_key("Ed25519", named)
    )


def sign(key: Key, algorithm: str, *, header: dict[str, Any] | None = None, **changed: Any) -> str:
    claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "dr-1", "roles": ["clinician"], "exp": time.time() + 600}
    kid = {"kid": key.get("kid")} if key.get("kid") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        return jwt.encode(
            {"alg": algorithm, **kid, **(header or {})}, {**claims, **changed}, key, algorithms=[algorithm]
        )


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
            self.wfile.write(found.body)

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


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def verifier(
    source: str, *, algorithms: tuple[str, ...] = tuple(PUBLIC_ALGORITHMS), clock: Clock | None = None
) -> PublicKeyVerifier:
    keys = IssuerKeys(source, freshness=Freshness(), clock=clock or Clock())
    return PublicKeyVerifier(keys, ISSUER, AUDIENCE, algorithms)


@pytest.mark.parametrize("algorithm", PUBLIC_ALGORITHMS)
@pytest.mark.parametrize("kid", ["2026-11", None])
async def test_each_algorithm_gets_in(issuer: Issuer, algorithm: str, kid: str | None) -> None:
    key = make_key(algorithm, kid)
    issuer.body = published(key)
    principal = await verifier(issuer.url).identify(sign(key, algorithm, jti="7"))
    assert (principal.subject, principal.roles, principal.token_id) == ("dr-1", {"clinician"}, "7")


@pytest.mark.parametrize("prefix", ["", "file://"])
async def test_keys_may_come_from_a_file(tmp_path: Path, prefix: str) -> None:
    key = make_key("ES256", "a")
    (tmp_path / "jwks.json").write_bytes(published(key))
    found = verifier(f"{prefix}{tmp_path / 'jwks.json'}")
    assert (await found.identify(sign(key, "ES256"))).subject == "dr-1"


async def test_a_rotated_key_is_found_at_once_and_a_withdrawn_one_refused_in_time(issuer: Issuer) -> None:
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
    # By age, when nobody brings an unknown key
    third = make_key("ES256", "third")
    issuer.body = published(third)
    assert await found.identify(sign(new, "ES256"))
    clock.now += 601
    with pytest.raises(Unauthenticated):
        await found.identify(sign(new, "ES256"))


async def test_unknown_keys_cost_the_issuer_one_request_an_interval(issuer: Issuer) -> None:
    key, stranger, clock = make_key("ES256", "a"), make_key("ES256", "b"), Clock()
    issuer.body = published(key)
    found = verifier(issuer.url, clock=clock)
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await found.identify(sign(stranger, "ES256"))
    assert issuer.asked == 1
    clock.now += 31
    for _ in range(20):
        with pytest.raises(Unauthenticated):
            await found.identify(sign(stranger, "ES256"))
    assert issuer.asked == 2


@pytest.mark.parametrize("fault", ["500", "redirect", "garbage", "huge", "down"])
async def test_an_issuer_in_trouble_is_outlived_but_not_for_ever(issuer: Issuer, fault: str) -> None:
    key, clock = make_key("ES256", "a"), Clock()
    issuer.body = published(key)
    found = verifier(issuer.url, clock=clock)
    token = sign(key, "ES256")
    assert await found.identify(token)
    if fault == "500":
        issuer.status = 500
    elif fault == "redirect":
        issuer.status, issuer.headers = 302, {"Location": issuer.url.replace("jwks", "other")}
    elif fault == "garbage":
        issuer.body = b"<html>"
    elif fault == "huge":
        issuer.body = b" " * (MAX_BYTES + 1)
    else:
        found._keys._source = "http://127.0.0.1:9/jwks.json"
    clock.now += 3600
    assert await found.identify(token)
    clock.now += 86_400
    with pytest.raises(IssuerKeysUnavailable):
        await found.identify(token)


async def test_without_any_key_the_service_says_so(tmp_path: Path) -> None:
    with pytest.raises(IssuerKeysUnavailable):
        await verifier(str(tmp_path / "missing")).identify(sign(make_key("ES256", "a"), "ES256"))


async def test_algorithms_are_from_the_allow_list_and_fit_the_key(issuer: Issuer) -> None:
    rsa, ec = make_key("RS256", "rsa"), make_key("ES256", "ec")
    issuer.body = published(rsa, ec)
    only_ec = verifier(issuer.url, algorithms=("ES256",))
    assert await only_ec.identify(sign(ec, "ES256"))
    public = rsa.as_pem(private=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        confused = OctKey.import_key(json.dumps(rsa.as_dict(private=False)))
    forged = [
        sign(rsa, "RS256"),
        sign(ec, "ES256", header={"kid": "rsa"}),
        sign(OctKey.import_key("x" * 64), "HS256", header={"kid": "ec"}),
        sign(confused, "HS256", header={"kid": "rsa"}),
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJkciJ9.x",
        sign(ec, "ES256", header={"jwk": ec.as_dict(private=False), "kid": "other"}),
        sign(make_key("ES256", "ec"), "ES256"),
        sign(ec, "ES256", iss="https://another.example"),
        sign(ec, "ES256", aud="another"),
        sign(ec, "ES256", exp=time.time() - 60),
    ]
    assert public
    for token in forged:
        with pytest.raises(Unauthenticated):
            await only_ec.identify(token)


@pytest.mark.parametrize("algorithms", [(), ("none",), ("HS256",), ("RS256", "HS256"), ("RS512",)])
def test_an_allow_list_that_makes_no_sense_is_refused(algorithms: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Algorithms"):
        verifier("/nowhere", algorithms=algorithms)


def test_a_set_is_read_strictly() -> None:
    good = make_key("ES256", "a")
    public = good.as_dict(private=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SecurityWarning)
        weak = RSAKey.generate_key(1024, {"kid": "weak"}).as_dict(private=False)
    others = [
        {"kty": "PQC", "kid": "later"},
        {**public, "kid": "enc", "use": "enc"},
        {**public, "kid": "ops", "key_ops": ["sign"]},
        weak,
        {"kty": "RSA", "n": "AA"},
        {**public, "kid": 7},
    ]
    (found,) = read_key_set(json.dumps({"keys": [*others, public]}).encode(), kinds=KINDS)
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
            read_key_set(content if isinstance(content, bytes) else json.dumps(content).encode(), kinds=KINDS)

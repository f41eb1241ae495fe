"""Tokens signed with an issuer's own key pair: its public keys as a JWK set (RFC 7517), from a file or a URL.

A request waits for the issuer only where no key is trusted yet, or where its token names an unknown one (the
issuer has rotated). Otherwise old keys are replaced in the background. The issuer is asked at most once an
interval, whoever sends tokens, and each time for a bounded number of seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
import json
import logging
from pathlib import Path
import ssl
import time
from typing import Any
import urllib.parse
import warnings

import httpx
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey

from serve_app.access.tokens import Principal, TokenVerifier, Verifier
from serve_app.domain.errors import IssuerKeysUnavailable, Unauthenticated
from serve_app.settings import Settings, split_words

#: Algorithm: the kind of key that it takes. Nothing symmetric: a public key is no secret.
PUBLIC_ALGORITHMS: dict[str, type[RSAKey | ECKey | OKPKey]] = {
    "RS256": RSAKey,
    "ES256": ECKey,
    "EdDSA": OKPKey,
    "Ed25519": OKPKey,
}

#: A set of a hundred RSA keys has 60 KB.
MAX_BYTES = 256 * 1024
#: NIST SP 800-131A rev. 2: RSA keys below 2048 bits do not sign any more.
MIN_RSA_BITS = 2048
_CURVES = frozenset({"P-256", "Ed25519"})
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_log = logging.getLogger("derm.tokens")


class KeySetRefused(Exception):
    """What the issuer published is not a set of public signature keys that may be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """When keys are asked for again, and how long they are trusted, seconds.

    `refresh_s`: keys of this age are replaced in the background while they go on being used. A key that the
    issuer withdrew is refused after that long, or after twice as long where nobody asked meanwhile.
    `trust_s`: keys of this age are used no longer when the issuer has not answered since. A day: an issuer
    that is down for a night or a maintenance window does not stop the clinic, and whoever holds a withdrawn key
    and cuts us off from the issuer gains no more than that.
    `interval_s`: the least time between two requests. `answer_s`: what one request may take in all.
    """

    refresh_s: float = 600.0
    trust_s: float = 86_400.0
    interval_s: float = 30.0
    answer_s: float = 5.0


class IssuerKeys:
    """The issuer's current public keys, by `kid`; `source` is a path, an http or an https URL.

    Belongs to the event loop that uses it first.
    """

    def __init__(
        self,
        source: str,
        *,
        freshness: Freshness | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # httpx logs every URL at INFO, httpcore headers at DEBUG.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._source = source
        self._freshness = freshness or Freshness()
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._fetched_at: float | None = None
        self._asked_at: float | None = None
        self._refresh: asyncio.Task[bool] | None = None

    def find(self, kid: str | None, algorithm: str) -> Key | None:
        """Find the key that may have signed; without a `kid`, the only one there is for the algorithm."""
        kind = PUBLIC_ALGORITHMS[algorithm]
        fitting = [
            key
            for key in self._keys
            if isinstance(key, kind)
            and key.get("alg", algorithm) == algorithm
            and (kid is None or key.get("kid") == kid)
        ]
        return fitting[0] if len(fitting) == 1 else None

    async def freshen(self) -> None:
        """Have old keys replaced; IssuerKeysUnavailable when there are none that may still be trusted."""
        limits, age = self._freshness, self._age()
        if age < limits.refresh_s:
            return
        answered_last = self._refresh is None or (self._refresh.done() and self._refresh.result())
        refresh = self._start_refresh()
        if age >= limits.trust_s:
            if refresh is not None:
                await asyncio.wait({refresh})
            if self._age() >= limits.trust_s:
                raise IssuerKeysUnavailable
        elif age >= 2 * limits.refresh_s and answered_last and refresh is not None:
            # Nobody asked for long: a moment for the issuer, so that a withdrawn key does not get in once more.
            await asyncio.wait({refresh}, timeout=limits.answer_s / 5)

    async def look_again(self) -> bool:
        """Ask the issuer for keys now, if the interval allows; say whether its answer came."""
        refresh = self._start_refresh()
        if refresh is None:
            return False
        await asyncio.wait({refresh})
        return refresh.result()

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    def _start_refresh(self) -> asyncio.Task[bool] | None:
        """The one request that is under way, or a new one; None when the last was too short a time ago."""
        if self._refresh is None or self._refresh.done():
            now = self._clock()
            if self._asked_at is not None and now - self._asked_at < self._freshness.interval_s:
                return None
            self._asked_at = now
            self._refresh = asyncio.create_task(self._ask())
        return self._refresh

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(self._freshness.answer_s):
                self._keys = read_key_set(await _fetch(self._source))
        except (OSError, httpx.HTTPError, httpx.InvalidURL, KeySetRefused) as error:
            # The exception's text may quote what was sent; its kind says enough.
            _log.warning("The token issuer's keys were not renewed: %s", type(error).__name__)
            return False
        self._fetched_at = self._clock()
        return True


async def _fetch(source: str) -> bytes:
    """Read a path or an http(s) URL; OSError or httpx.HTTPError when it cannot be had, KeySetRefused when too large."""
    if urllib.parse.urlsplit(source).scheme not in {"http", "https"}:
        content = await asyncio.to_thread(Path(source.removeprefix("file://")).read_bytes)
    else:
        content = b""
        # Who may sign is for the configured address to say, behind no redirect; and no proxy: the issuer is on premises.
        async with (
            httpx.AsyncClient(verify=ssl.create_default_context(), trust_env=False) as client,
            client.stream("GET", source) as answer,
        ):
            answer.raise_for_status()
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > MAX_BYTES:
                    break
    if len(content) > MAX_BYTES:
        raise KeySetRefused("too large")
    return content


def read_key_set(content: bytes) -> tuple[Key, ...]:
    """Take the signature keys of these kinds out of a set; others are passed over, as RFC 7517 5 asks.

    KeySetRefused for what is no set, for a set that shows a private or a shared key (whoever reads it
    could sign), for two keys of one `kid`, and for a set without a single key to use.
    """
    try:
        document = json.loads(content)
        entries = document["keys"]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise KeySetRefused("not a JWK set")
    except (ValueError, LookupError, TypeError, RecursionError):
        raise KeySetRefused("not a JWK set") from None
    if any(_PRIVATE & entry.keys() for entry in entries):
        raise KeySetRefused("it shows a private or a shared key")
    keys = [key for entry in entries if (key := _read(entry)) is not None]
    named = [key.get("kid") for key in keys if key.get("kid") is not None]
    if not keys or len(named) != len(set(named)):
        raise KeySetRefused("no key to use, or two of one kid")
    return tuple(keys)


def _read(entry: dict[str, Any]) -> Key | None:
    """Import one key; None for one that does not sign, is too weak, or of another kind."""
    operations = entry.get("key_ops", ["verify"])
    verifies = entry.get("use", "sig") == "sig" and isinstance(operations, list) and "verify" in operations
    if not verifies or not isinstance(entry.get("kid", ""), str):
        return None
    try:
        with warnings.catch_warnings():
            # Of weak keys, which are passed over below.
            warnings.simplefilter("ignore", SecurityWarning)
            key = JWKRegistry.import_key(entry)
    except (JoseError, ValueError, TypeError, LookupError, AttributeError):
        return None
    if isinstance(key, RSAKey):
        return key if key.public_key.key_size >= MIN_RSA_BITS else None
    return key if isinstance(key, ECKey | OKPKey) and entry.get("crv") in _CURVES else None


class PublicKeyVerifier(Verifier):
    """Checks tokens against the issuer's public keys.

    ValueError for an allow-list with anything but RS256, ES256, EdDSA and Ed25519 in it.
    """

    def __init__(self, keys: IssuerKeys, issuer: str, audience: str, algorithms: Collection[str]) -> None:
        if not algorithms or not PUBLIC_ALGORITHMS.keys() >= set(algorithms):
            raise ValueError(f"Algorithms must be among {sorted(PUBLIC_ALGORITHMS)}")
        super().__init__(issuer, audience, algorithms)
        self._keys = keys

    async def identify(self, token: str) -> Principal:
        """Say who signed in; Unauthenticated for anything but a valid token.

        IssuerKeysUnavailable when no key is known to check it with, whatever it is.
        """
        await self._keys.freshen()
        missing: list[bool] = []

        def choose(token_header: Any) -> Key:  # noqa: ANN401 - joserfc's own protocol, with headers() only
            header = token_header.headers()
            algorithm, kid = header.get("alg"), header.get("kid")
            if algorithm not in self._algorithms or not (kid is None or isinstance(kid, str)):
                raise LookupError
            key = self._keys.find(kid, algorithm)
            if key is None:
                missing.append(True)
                raise LookupError
            return key

        try:
            return self.read(token, choose)
        except Unauthenticated:
            if not missing or not await self._keys.look_again():
                raise
        return self.read(token, choose)


def token_verifier(settings: Settings) -> Verifier:
    """Check tokens by the issuer's published keys where they are configured, else by the shared secret."""
    issuer, audience = settings.token_issuer, settings.token_audience
    if not settings.token_jwks:
        return TokenVerifier(settings.token_secret.get_secret_value(), issuer, audience)
    keys = IssuerKeys(settings.token_jwks, freshness=Freshness(refresh_s=settings.token_jwks_refresh_s))
    return PublicKeyVerifier(keys, issuer, audience, split_words(settings.token_algorithms))

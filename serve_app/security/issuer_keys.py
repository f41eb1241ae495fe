"""Tokens signed with an issuer's own key pair: its public keys as a JWK set (RFC 7517), from a file or a URL.

Keys are asked for again when they are old, and when a token names one that is not known (the issuer
has rotated), but never more often than once an interval: a forger's `kid` costs the issuer nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
import logging
import time
from typing import Any

from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from serve_app.domain.errors import IssuerKeysUnavailable, Unauthenticated
from serve_app.security.key_set import KeySetRefused, fetch_key_set, read_key_set
from serve_app.security.tokens import ClaimsReader, Principal

#: Algorithm: the kind of key that it takes. Nothing symmetric: a public key is no secret.
PUBLIC_ALGORITHMS: dict[str, type[RSAKey | ECKey | OKPKey]] = {
    "RS256": RSAKey,
    "ES256": ECKey,
    "EdDSA": OKPKey,
    "Ed25519": OKPKey,
}

_log = logging.getLogger("derm.tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Freshness:
    """When keys are asked for again, seconds.

    `refresh_s`: keys of this age are replaced while they go on being used; a key that the issuer
    withdrew is refused after that long. `trust_s`: keys of this age are used no longer, when the
    issuer has not answered since. `interval_s`: the least time between two requests.
    """

    refresh_s: float = 600.0
    trust_s: float = 86_400.0
    interval_s: float = 30.0


class IssuerKeys:
    """The issuer's current public keys, by `kid`; `source` is a path, an http or an https URL."""

    def __init__(
        self,
        source: str,
        *,
        freshness: Freshness | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._freshness = freshness or Freshness()
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._fetched_at: float | None = None
        self._asked_at: float | None = None
        self._lock = asyncio.Lock()

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
        """Replace keys that are old; IssuerKeysUnavailable when there are none that may still be trusted."""
        if self._age() >= self._freshness.refresh_s:
            await self._ask()
        if self._age() >= self._freshness.trust_s:
            raise IssuerKeysUnavailable

    async def look_again(self) -> bool:
        """Ask the issuer for keys now, if the interval allows; say whether its answer came."""
        return await self._ask()

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    async def _ask(self) -> bool:
        wanted_at = self._clock()
        async with self._lock:
            if self._fetched_at is not None and self._fetched_at >= wanted_at:
                return True  # somebody else's request, while this one waited, brought what it wants
            if self._asked_at is not None and self._clock() - self._asked_at < self._freshness.interval_s:
                return False
            self._asked_at = self._clock()
            try:
                text = await asyncio.to_thread(fetch_key_set, self._source)
                keys = read_key_set(text, kinds=tuple(PUBLIC_ALGORITHMS.values()))
            except (OSError, KeySetRefused) as error:
                # The exception's text may quote what was sent; its kind says enough.
                _log.warning("The token issuer's keys were not renewed: %s", type(error).__name__)
                return False
            self._keys, self._fetched_at = keys, self._clock()
            return True


class PublicKeyVerifier:
    """Checks tokens against the issuer's public keys.

    ValueError for an allow-list with anything but RS256, ES256, EdDSA and Ed25519 in it.
    """

    def __init__(self, keys: IssuerKeys, issuer: str, audience: str, algorithms: Collection[str]) -> None:
        if not algorithms or not PUBLIC_ALGORITHMS.keys() >= set(algorithms):
            raise ValueError(f"Algorithms must be among {sorted(PUBLIC_ALGORITHMS)}")
        self._keys = keys
        self._algorithms = frozenset(algorithms)
        self._reader = ClaimsReader(issuer, audience, algorithms)

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
            return self._reader.read(token, choose)
        except Unauthenticated:
            if not missing or not await self._keys.look_again():
                raise
        return self._reader.read(token, choose)

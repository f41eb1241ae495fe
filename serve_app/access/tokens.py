"""Bearer tokens: who is calling, as the PMS's issuer signed it (JWT, RFC 7519), and the issuer's public keys.

The rules are RFC 8725's: algorithms from an allow-list, never from the token; issuer, audience and expiry always there
and always checked. One issuer signs either with a shared secret (TokenVerifier) or with keys of its own that it
publishes as a JWK set (RFC 7517) in a file or at a URL (PublicKeyVerifier), never both ways.

A request waits for the issuer only where no key is trusted yet, or where its token names an unknown one (the
issuer has rotated). Otherwise old keys are replaced in the background. The issuer is asked at most once an
interval, whoever sends tokens, and each time for a bounded number of seconds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
import asyncio
from collections.abc import Callable, Collection, Iterable
import json
import logging
from pathlib import Path
import re
import ssl
import time
from typing import Any
import unicodedata
import urllib.parse
from uuid import uuid4
import warnings

import httpx
from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, Key, OctKey, OKPKey, RSAKey

from serve_app.access.rules import Principal
from serve_app.audit.events import reads_like_own_actor
from serve_app.domain.errors import IssuerKeysUnavailable, LifetimeRefused, SubjectRefused, Unauthenticated
from serve_app.settings import SECRET_BYTES, Settings, split_words

_COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
_TOKEN_LENGTH = 8192
_NAME_LENGTH = 255
#: What shows nothing and is printable to Python (Unicode's Default_Ignorable_Code_Point, and the empty Braille cell).
_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_LEEWAY_S = 5
_DAY_S = 86_400

#: Algorithm: the kind of key that it takes, and its curve. Nothing symmetric: a public key is no secret.
PUBLIC_ALGORITHMS: dict[str, tuple[type[RSAKey | ECKey | OKPKey], str | None]] = {
    "RS256": (RSAKey, None),
    "RS384": (RSAKey, None),
    "ES256": (ECKey, "P-256"),
    "ES384": (ECKey, "P-384"),
    "EdDSA": (OKPKey, "Ed25519"),
    "Ed25519": (OKPKey, "Ed25519"),
}

#: A set of a hundred RSA keys has 60 KB.
MAX_BYTES = 256 * 1024
#: NIST SP 800-131A rev. 2: RSA keys below 2048 bits do not sign any more.
MIN_RSA_BITS = 2048
#: Keys of this age are used no longer when the issuer has not answered since, seconds. A day: an issuer that is down for
#: a night does not stop the clinic, and whoever holds a withdrawn key and cuts us off from the issuer gains no more.
TRUST_S = 86_400.0
#: The least time between two requests to the issuer, and what one may take in all, seconds.
INTERVAL_S = 30.0
ANSWER_S = 5.0
_CURVES = frozenset(curve for _, curve in PUBLIC_ALGORITHMS.values())
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

_log = logging.getLogger("derm.tokens")


class Verifier(ABC):
    """Checks a token's form, signature and claims; which key may have signed is a subclass's to know.

    Clocks may differ by 5 s. A token may be valid for `max_lifetime_s` from its `iat`; without one, from now. Beside
    `iss`, `aud` and `exp` it must have what is `required`.
    """

    def __init__(
        self,
        issuer: str,
        audience: str,
        algorithms: Collection[str],
        *,
        max_lifetime_s: int = _DAY_S,
        required: Collection[str] = (),
    ) -> None:
        self._algorithms = tuple(algorithms)
        self._max_lifetime_s = max_lifetime_s
        self._claims = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
        )
        self._claims.options |= {claim: {"essential": True} for claim in required}

    @abstractmethod
    async def identify(self, token: str) -> Principal:
        """Say who signed in; Unauthenticated for anything but a valid token, as `read` says, or SubjectRefused."""

    def read(self, token: str, key: Key | Callable[[Any], Key]) -> jwt.Claims:
        """Read what a token claims; Unauthenticated, without a hint why, for anything but a valid token.

        LifetimeRefused for one that the issuer signed, and should not have. A `key` that is called with the token's
        header may raise LookupError.
        """
        if len(token) > _TOKEN_LENGTH or not _COMPACT.fullmatch(token):
            raise Unauthenticated
        try:
            with warnings.catch_warnings():
                # `EdDSA` is the older name of what RFC 9864 calls Ed25519, and what most issuers still write.
                warnings.simplefilter("ignore", SecurityWarning)
                claims = jwt.decode(token, key, algorithms=self._algorithms).claims
            self._claims.validate(claims)
            # Added, not subtracted: a number of 400 digits is no float.
            begins = claims["iat"] if "iat" in claims else time.time() + _LEEWAY_S
            if claims["exp"] > begins + self._max_lifetime_s:
                raise LifetimeRefused
        except (JoseError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # joserfc takes the header for a JSON object of the right types; a forger need not.
            raise Unauthenticated from error
        return claims


class TokenVerifier(Verifier):
    """Checks tokens signed with a shared secret (HS256); ValueError for one of less than 32 bytes."""

    def __init__(self, secret: str, issuer: str, audience: str, *, max_lifetime_s: int = _DAY_S) -> None:
        super().__init__(issuer, audience, ("HS256",), max_lifetime_s=max_lifetime_s)
        self._key = _signing_key(secret)

    def verify(self, token: str) -> Principal:
        """As `identify`: with a secret there is nothing to wait for."""
        return _principal(self.read(token, self._key))

    async def identify(self, token: str) -> Principal:
        """As Verifier.identify."""
        return self.verify(token)


def mint_token(
    *,
    secret: str,
    issuer: str,
    audience: str,
    subject: str,
    roles: Iterable[str],
    lifetime_s: int = 3600,
    token_id: str | None = None,
) -> str:
    """Sign a token as the PMS's issuer would: for development and tests. SubjectRefused as for a caller's."""
    now = int(time.time())
    claims: jwt.Claims = {
        "iss": issuer,
        "aud": audience,
        "sub": check_subject(subject),
        "roles": sorted(roles),
        "iat": now,
        "exp": now + lifetime_s,
        "jti": token_id or str(uuid4()),
    }
    return jwt.encode({"alg": "HS256"}, claims, _signing_key(secret))


def issue_token(
    settings: Settings, subject: str, roles: Iterable[str], *, lifetime_s: int | None = None
) -> str:
    """Sign a token that this node takes: an hour's, where it takes so long a one. SubjectRefused or LifetimeRefused."""
    longest = settings.token_max_lifetime_s
    if lifetime_s is not None and not 0 < lifetime_s <= longest:
        raise LifetimeRefused(f"A token is valid for 1 to {longest} s (DERM_TOKEN_MAX_LIFETIME_S).")
    return mint_token(
        secret=settings.token_secret.get_secret_value(),
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        subject=subject,
        roles=roles,
        lifetime_s=lifetime_s or min(3600, longest),
    )


def check_subject(subject: object) -> str:
    """Take a subject that the audit log may name; SubjectRefused for any other.

    Nothing that could forge a line of the log, that reads like another principal's name, or like one of our own.
    """
    if not isinstance(subject, str) or not _is_plain(subject) or reads_like_own_actor(subject):
        raise SubjectRefused
    return subject


def _is_plain(name: str) -> bool:
    """Whether a name is all that it shows: two that read the same are the same, but for look-alike letters."""
    return (
        0 < len(name) <= _NAME_LENGTH
        and name.isprintable()
        and name.strip() == name
        and not _UNSEEN.search(name)
        and unicodedata.is_normalized("NFKC", name)
    )


def _signing_key(secret: str) -> OctKey:
    if len(secret.encode()) < SECRET_BYTES:
        raise ValueError(f"The token secret must have at least {SECRET_BYTES} bytes")
    return OctKey.import_key(secret)


def _principal(claims: jwt.Claims) -> Principal:
    roles = claims.get("roles", [])
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise Unauthenticated
    # An operator writes it to the revocation list as it reads. RFC 7519 4.1.7: a string.
    jti = claims.get("jti")
    if jti is not None and not (isinstance(jti, str) and _is_plain(jti)):
        raise Unauthenticated
    return Principal(check_subject(claims.get("sub")), frozenset(roles), jti)


class KeySetRefused(Exception):
    """What the issuer published is not a set of public signature keys that may be used."""


class IssuerKeys:
    """The issuer's current public keys, by `kid`; `source` is a path, an http or an https URL.

    Keys as old as `refresh_s` are replaced in the background while they go on being used. A key that the issuer
    withdrew is refused after that long, or after twice as long where nobody asked meanwhile. Belongs to the event
    loop that uses it first.
    """

    def __init__(
        self, source: str, *, refresh_s: float = 600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # httpx logs every URL at INFO, httpcore headers at DEBUG.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._source = source
        self._refresh_s = refresh_s
        self._clock = clock
        self._keys: tuple[Key, ...] = ()
        self._fetched_at: float | None = None
        self._asked_at: float | None = None
        self._refresh: asyncio.Task[bool] | None = None

    def find(self, kid: str | None, algorithm: str) -> Key | None:
        """Find the key that may have signed; without a `kid`, the only one there is for the algorithm."""
        kind, curve = PUBLIC_ALGORITHMS[algorithm]
        fitting = [
            key
            for key in self._keys
            if isinstance(key, kind)
            and key.get("crv") == curve
            and key.get("alg", algorithm) == algorithm
            and (kid is None or key.get("kid") == kid)
        ]
        return fitting[0] if len(fitting) == 1 else None

    async def freshen(self) -> None:
        """Have old keys replaced; IssuerKeysUnavailable when there are none that may still be trusted."""
        age = self._age()
        if age < self._refresh_s:
            return
        answered_last = self._refresh is None or (self._refresh.done() and self._refresh.result())
        refresh = self._start_refresh()
        if age >= TRUST_S:
            if refresh is not None:
                await asyncio.wait({refresh})
            if self._age() >= TRUST_S:
                raise IssuerKeysUnavailable
        elif age >= 2 * self._refresh_s and answered_last and refresh is not None:
            # Nobody asked for long: a moment for the issuer, so that a withdrawn key does not get in once more.
            await asyncio.wait({refresh}, timeout=ANSWER_S / 5)

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
            if self._asked_at is not None and now - self._asked_at < INTERVAL_S:
                return None
            self._asked_at = now
            self._refresh = asyncio.create_task(self._ask())
        return self._refresh

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(ANSWER_S):
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
        content = await asyncio.to_thread(_read_file, Path(source.removeprefix("file://")))
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


def _read_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


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
    """Checks tokens against the issuer's public keys; ValueError for an allow-list with any but PUBLIC_ALGORITHMS in it."""

    def __init__(
        self,
        keys: IssuerKeys,
        issuer: str,
        audience: str,
        algorithms: Collection[str],
        *,
        max_lifetime_s: int = _DAY_S,
        required: Collection[str] = (),
    ) -> None:
        if not algorithms or not PUBLIC_ALGORITHMS.keys() >= set(algorithms):
            raise ValueError(f"Algorithms must be among {sorted(PUBLIC_ALGORITHMS)}")
        super().__init__(issuer, audience, algorithms, max_lifetime_s=max_lifetime_s, required=required)
        self._keys = keys

    async def identify(self, token: str) -> Principal:
        """As Verifier.identify; IssuerKeysUnavailable as `claims` says."""
        return _principal(await self.claims(token))

    async def claims(self, token: str) -> jwt.Claims:
        """As Verifier.read; IssuerKeysUnavailable when no key is known to check it with, whatever it is."""
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
    issuer, audience, longest = settings.token_issuer, settings.token_audience, settings.token_max_lifetime_s
    if not settings.token_jwks:
        secret = settings.token_secret.get_secret_value()
        return TokenVerifier(secret, issuer, audience, max_lifetime_s=longest)
    keys = IssuerKeys(settings.token_jwks, refresh_s=settings.token_jwks_refresh_s)
    algorithms = split_words(settings.token_algorithms)
    return PublicKeyVerifier(keys, issuer, audience, algorithms, max_lifetime_s=longest)

"""Bearer tokens: who is calling, as the PMS's issuer signed it (JWT, RFC 7519).

The rules are RFC 8725's: algorithms from an allow-list, never from the token; issuer,
audience and expiry always there and always checked. One issuer signs either with a shared
secret (TokenVerifier) or with keys of its own that it publishes (issuer_keys.py), never both ways.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
import re
import time
from typing import Any
from uuid import uuid4
import warnings

from joserfc import jwt
from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import Key, OctKey

from serve_app.domain.errors import Unauthenticated
from serve_app.settings import SECRET_BYTES

_COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
_TOKEN_LENGTH = 8192
_SUBJECT_LENGTH = 255
_LEEWAY_S = 5


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: `subject` is unique at the issuer, printable, 1 to 255 characters.

    `token_id` is the token's own `jti`, by which it alone can be revoked; not every issuer gives one.
    Whichever token it comes with, a principal is the same.
    """

    subject: str
    roles: frozenset[str]
    token_id: str | None = field(default=None, compare=False)


class Verifier(ABC):
    """Checks a token's form, signature and claims; which key may have signed is a subclass's to know.

    Clocks may differ by 5 s.
    """

    def __init__(self, issuer: str, audience: str, algorithms: Collection[str]) -> None:
        self._algorithms = tuple(algorithms)
        self._claims = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    @abstractmethod
    async def identify(self, token: str) -> Principal:
        """Say who signed in; Unauthenticated for anything but a valid token."""

    def read(self, token: str, key: Key | Callable[[Any], Key]) -> Principal:
        """Say who signed in; Unauthenticated, without a hint why, for anything but a valid token.

        A `key` that is called with the token's header may raise LookupError.
        """
        if len(token) > _TOKEN_LENGTH or not _COMPACT.fullmatch(token):
            raise Unauthenticated
        try:
            with warnings.catch_warnings():
                # `EdDSA` is the older name of what RFC 9864 calls Ed25519, and what most issuers still write.
                warnings.simplefilter("ignore", SecurityWarning)
                claims = jwt.decode(token, key, algorithms=self._algorithms).claims
            self._claims.validate(claims)
            return _principal(claims)
        except (JoseError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # joserfc takes the header for a JSON object of the right types; a forger need not.
            raise Unauthenticated from error


class TokenVerifier(Verifier):
    """Checks tokens signed with a shared secret (HS256); ValueError for one of less than 32 bytes."""

    def __init__(self, secret: str, issuer: str, audience: str) -> None:
        super().__init__(issuer, audience, ("HS256",))
        self._key = _signing_key(secret)

    def verify(self, token: str) -> Principal:
        """As `identify`: with a secret there is nothing to wait for."""
        return self.read(token, self._key)

    async def identify(self, token: str) -> Principal:
        """Say who signed in; Unauthenticated, without a hint why, for anything but a valid token."""
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
    """Sign a token as the PMS's issuer would: for development and tests."""
    now = int(time.time())
    claims: jwt.Claims = {
        "iss": issuer,
        "aud": audience,
        "sub": subject,
        "roles": sorted(roles),
        "iat": now,
        "exp": now + lifetime_s,
        "jti": token_id or str(uuid4()),
    }
    return jwt.encode({"alg": "HS256"}, claims, _signing_key(secret))


def _signing_key(secret: str) -> OctKey:
    if len(secret.encode()) < SECRET_BYTES:
        raise ValueError(f"The token secret must have at least {SECRET_BYTES} bytes")
    return OctKey.import_key(secret)


def _principal(claims: jwt.Claims) -> Principal:
    # The subject goes into the audit log: nothing there that could forge a line of it.
    subject, roles = claims["sub"], claims.get("roles", [])
    if not subject.strip() or len(subject) > _SUBJECT_LENGTH or not subject.isprintable():
        raise ValueError("sub")
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise ValueError("roles")
    # Written to the revocation list as it stands, so as strict as a subject. RFC 7519 4.1.7: a string.
    jti = claims.get("jti")
    if jti is not None and not (
        isinstance(jti, str) and 0 < len(jti) <= _SUBJECT_LENGTH and jti.isprintable()
    ):
        raise ValueError("jti")
    return Principal(subject, frozenset(roles), jti)

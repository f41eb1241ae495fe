"""Bearer tokens: who is calling, as the PMS's issuer signed it (JWT, RFC 7519).

The rules are RFC 8725's: algorithms from an allow-list, never from the token; issuer,
audience and expiry always there and always checked.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
import re
import time

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

from serve_app.domain.errors import Unauthenticated

_SECRET_ALGORITHMS = frozenset({"HS256", "HS384", "HS512"})
_SECRET_BYTES = 32  # RFC 7518 3.2: at least as long as HS256's hash
_COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)
_TOKEN_LENGTH = 8192
_SUBJECT_LENGTH = 255
_LEEWAY_S = 5


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: `subject` is unique at the issuer, printable, 1 to 255 characters."""

    subject: str
    roles: frozenset[str]


class TokenVerifier:
    """Checks tokens signed with a shared secret of 32 bytes or more.

    Clocks may differ by 5 s. ValueError for a short secret, or for an algorithm that is not
    HMAC: `none` and public-key algorithms make no sense with a secret.
    """

    def __init__(
        self, secret: str, issuer: str, audience: str, algorithms: Collection[str] = ("HS256",)
    ) -> None:
        if not algorithms or not _SECRET_ALGORITHMS.issuperset(algorithms):
            raise ValueError(f"Algorithms must be among {sorted(_SECRET_ALGORITHMS)}")
        self._key = _signing_key(secret)
        self._algorithms = tuple(algorithms)
        self._claims = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY_S,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            sub={"essential": True},
        )

    def verify(self, token: str) -> Principal:
        """Say who signed in; Unauthenticated, without a hint why, for anything but a valid token."""
        if len(token) > _TOKEN_LENGTH or not _COMPACT.fullmatch(token):
            raise Unauthenticated
        try:
            claims = jwt.decode(token, self._key, algorithms=self._algorithms).claims
            self._claims.validate(claims)
            return _principal(claims)
        except (JoseError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # joserfc takes the header for a JSON object of the right types; a forger need not.
            raise Unauthenticated from error


def mint_token(
    *, secret: str, issuer: str, audience: str, subject: str, roles: Iterable[str], lifetime_s: int = 3600
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
    }
    return jwt.encode({"alg": "HS256"}, claims, _signing_key(secret))


def _signing_key(secret: str) -> OctKey:
    if len(secret.encode()) < _SECRET_BYTES:
        raise ValueError(f"The token secret must have at least {_SECRET_BYTES} bytes")
    return OctKey.import_key(secret)


def _principal(claims: jwt.Claims) -> Principal:
    # The subject goes into the audit log: nothing there that could forge a line of it.
    subject, roles = claims["sub"], claims.get("roles", [])
    if not subject.strip() or len(subject) > _SUBJECT_LENGTH or not subject.isprintable():
        raise ValueError("sub")
    if not isinstance(roles, list) or not all(isinstance(role, str) for role in roles):
        raise ValueError("roles")
    return Principal(subject, frozenset(roles))

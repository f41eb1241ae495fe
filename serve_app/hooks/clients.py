"""Which EHR calls by CDS Hooks, as its token says (CDS Hooks 2.0, "Trusting CDS Clients").

The token proves the EHR, and nothing of the clinician who sits before it. Which keys may have signed is configured, by
issuer: an address in a token is compared and never asked.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from serve_app.access.tokens import IssuerKeys, PublicKeyVerifier
from serve_app.domain.errors import Unauthenticated
from serve_app.domain.strict_json import read_json
from serve_app.settings import HookClient, HookSettings

#: From a token's `iat` to its `exp`. The specification asks for short; for so long its `jti` is kept three times over.
LIFETIME_S = 300
_TOKEN_ID_LENGTH = 255


@dataclass(frozen=True, slots=True)
class Caller:
    """An EHR that calls: its name and settings, and the id of the token that it came with, good for one request."""

    name: str
    client: HookClient
    token_id: str


class HookClients:
    """The EHRs that may call, each with its keys. Belongs to the event loop that uses it first."""

    def __init__(self, settings: HookSettings, *paths: str) -> None:
        """`paths`: the addresses that are called, below the base URL; a token is for one of them (`aud`)."""
        self._clients = settings.clients
        self._verifiers: dict[tuple[str, str], PublicKeyVerifier] = {}
        for name, client in settings.clients.items():
            keys = IssuerKeys(client.jwks)
            for path in paths:
                self._verifiers[name, path] = PublicKeyVerifier(
                    keys,
                    client.issuer,
                    f"{settings.base_url}{path}",
                    client.algorithms,
                    max_lifetime_s=LIFETIME_S,
                    required=("iat", "jti"),
                )

    async def identify(self, token: str, path: str) -> Caller:
        """Say which EHR calls this path; Unauthenticated, LifetimeRefused or IssuerKeysUnavailable as for any token.

        An issuer, a tenant or a key set's address that is not listed is refused before any key is asked for.
        """
        header, claimed = _read_unverified(token)
        name = self._name_of(claimed)
        client = self._clients[name]
        if "jku" in header and (client.jku is None or header["jku"] != client.jku):
            raise Unauthenticated
        if not isinstance(header.get("kid"), str) or header.get("typ", "JWT") != "JWT":
            raise Unauthenticated
        claims = await self._verifiers[name, path].claims(token)
        token_id = claims["jti"]
        # Half a character (`\ud800`) is text to JSON, and has no bytes.
        if len(token_id) > _TOKEN_ID_LENGTH or not token_id.isprintable() or self._name_of(claims) != name:
            raise Unauthenticated
        return Caller(name, client, token_id)

    def _name_of(self, claimed: dict[str, Any]) -> str:
        for name, client in self._clients.items():
            if claimed.get("iss") == client.issuer and client.tenant in (None, claimed.get("tenant")):
                return name
        raise Unauthenticated


def _read_unverified(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and claims as they stand there, to choose by whom the token must be signed."""
    parts = token.split(".")
    try:
        header, claims = (
            read_json(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))) for part in parts[:2]
        )
    except (ValueError, TypeError) as error:
        raise Unauthenticated from error
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise Unauthenticated
    return header, claims

"""The door as a node's settings have it: whose tokens, and how many of them."""

from __future__ import annotations

from serve_app.api.door import Door, Limits
from serve_app.records.access import AccessStore
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.security.issuer_keys import Freshness, IssuerKeys, PublicKeyVerifier
from serve_app.security.tokens import TokenVerifier, Verifier
from serve_app.settings import Settings


def open_door(settings: Settings, pool: Pool, records: LesionStore) -> Door:
    """Make the door of one ingress process."""
    return Door(
        verifier=token_verifier(settings),
        access=AccessStore(pool),
        records=records,
        limits=Limits(
            rate_per_s=settings.rate_limit_per_s,
            burst=settings.rate_limit_burst,
            unauthenticated_per_minute=settings.unauthenticated_per_minute,
            events_per_minute=settings.refusal_events_per_minute,
            trusted_proxies=frozenset(words(settings.trusted_proxies)),
        ),
    )


def token_verifier(settings: Settings) -> Verifier:
    """Check tokens by the issuer's published keys where they are configured, else by the shared secret."""
    if settings.token_jwks:
        return PublicKeyVerifier(
            IssuerKeys(settings.token_jwks, freshness=Freshness(refresh_s=settings.token_jwks_refresh_s)),
            settings.token_issuer,
            settings.token_audience,
            words(settings.token_algorithms),
        )
    return TokenVerifier(
        settings.token_secret.get_secret_value(), settings.token_issuer, settings.token_audience
    )


def words(text: str) -> tuple[str, ...]:
    """Split a setting of several words at its commas."""
    return tuple(word for part in text.split(",") if (word := part.strip()))

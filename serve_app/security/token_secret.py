"""What a shared token secret must be, and which ones must not sign for patients."""

from __future__ import annotations

import secrets

#: RFC 7518 3.2: at least as long as HS256's hash.
SECRET_BYTES = 32

#: What a secret begins with that a node made for itself, so that no PMS signs with it.
DEVELOPMENT_PREFIX = "development-"

_EXAMPLES = ("changeme", "change-me", "change_me", "secret", "password", "example", "development")
_DISTINCT_CHARACTERS = 10


def make_development_secret() -> str:
    """Make a secret for a node without an issuer; production refuses it."""
    return DEVELOPMENT_PREFIX + secrets.token_urlsafe(48)


def find_weakness(secret: str) -> str | None:
    """Say why a secret must not sign tokens in production; None when nothing is known against it."""
    if len(secret.encode()) < SECRET_BYTES:
        return f"it has fewer than {SECRET_BYTES} bytes"
    if secret.startswith(DEVELOPMENT_PREFIX):
        return "`derm-cds serve` made it for development"
    if any(example in secret.lower() for example in _EXAMPLES):
        return "it reads like an example"
    if len(set(secret)) < _DISTINCT_CHARACTERS:
        return f"it has fewer than {_DISTINCT_CHARACTERS} different characters"
    return None

"""A JWK set (RFC 7517) of public signature keys: fetched within bounds, and read strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
import urllib.error
import urllib.parse
import urllib.request
import warnings

from joserfc.errors import JoseError, SecurityWarning
from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey

#: A set of a hundred RSA keys has 60 KB.
MAX_BYTES = 256 * 1024
TIMEOUT_S = 5.0
#: NIST SP 800-131A rev. 2: RSA keys below 2048 bits do not sign any more.
MIN_RSA_BITS = 2048
_CURVES = frozenset({"P-256", "Ed25519"})
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})


class KeySetRefused(Exception):
    """What the issuer published is not a set of public signature keys that may be used."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as its base has it
        """Follow nobody: who may sign is for the configured address to say, and for no other."""
        return


# No proxy either, whatever the environment says: the issuer is on premises.
_OPENER = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))


def fetch_key_set(source: str) -> bytes:
    """Read a path or an http(s) URL; OSError when it cannot be had, KeySetRefused when it is too large."""
    if urllib.parse.urlsplit(source).scheme in {"http", "https"}:
        with _OPENER.open(source, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read(MAX_BYTES + 1)
    else:
        with Path(source.removeprefix("file://")).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise KeySetRefused("too large")
    return content


def read_key_set(content: bytes, *, kinds: tuple[type[RSAKey | ECKey | OKPKey], ...]) -> tuple[Key, ...]:
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
    keys = [key for entry in entries if (key := _read(entry, kinds)) is not None]
    named = [kid for key in keys if (kid := key.get("kid")) is not None]
    if not keys or len(named) != len(set(named)):
        raise KeySetRefused("no key to use, or two of one kid")
    return tuple(keys)


def _read(entry: dict[str, Any], kinds: tuple[type[RSAKey | ECKey | OKPKey], ...]) -> Key | None:
    """Import one key; None for one that does not sign, is too weak, or of another kind."""
    operations = entry.get("key_ops", ["verify"])
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        return None
    if not isinstance(entry.get("kid", ""), str):
        return None
    try:
        with warnings.catch_warnings():
            # Of weak keys, which are passed over below.
            warnings.simplefilter("ignore", SecurityWarning)
            key = JWKRegistry.import_key(entry)
    except (JoseError, ValueError, TypeError, LookupError, AttributeError):
        return None
    if not isinstance(key, kinds):
        return None
    if isinstance(key, RSAKey):
        return key if key.public_key.key_size >= MIN_RSA_BITS else None
    return key if entry.get("crv") in _CURVES else None

"""Vault's transit engine as its API documents it, for one mount and AES-256-GCM keys."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
import os
import re
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tests.serve_app.keys.key_service import Answer

_PATH = re.compile(r"/v1/(?P<mount>[^/]+)/(?P<verb>encrypt|decrypt|keys)/(?P<key>[^/]+)(/(?P<action>\w+))?")


class Vault:
    """Keys by name; a request without the token is answered 403, as one that the policy forbids."""

    content_type = "application/json"

    def __init__(self) -> None:
        self.token = "s.right"
        self.forbidden: set[str] = set()
        self.keys: dict[str, dict[str, Any]] = {}
        self.seen: list[dict[str, Any]] = []

    def make_key(self, name: str, *, kind: str = "aes256-gcm96", derived: bool = False) -> None:
        """Add a key with one version."""
        self.keys[name] = {
            "name": name,
            "type": kind,
            "derived": derived,
            "versions": {1: os.urandom(32)},
            "min_decryption_version": 1,
            "min_encryption_version": 0,
            "min_available_version": 0,
        }

    def fault(self, status: int) -> dict[str, Any]:
        """Say it as Vault does."""
        return {"errors": ["Vault is sealed" if status == 503 else f"fault {status}"]}

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        """Do what the path asks for, and remember the request."""
        self.seen.append({"path": path, "headers": dict(headers), "body": body})
        match = _PATH.fullmatch(path)
        verb = match and (match["action"] or match["verb"])
        if headers.get("X-Vault-Token") != self.token or verb in self.forbidden:
            return 403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}
        if match is None or match["mount"] != "transit" or match["key"] not in self.keys:
            return 404, {"errors": []}
        key = self.keys[match["key"]]
        try:
            data = getattr(self, f"_{verb}")(key, body)
        except (ValueError, KeyError) as error:
            return 400, {"errors": [str(error)]}
        return (204, None) if data is None else (200, {"request_id": "r", "lease_id": "", "data": data})

    def _keys(self, key: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        shown = {k: v for k, v in key.items() if k != "versions"}
        times = dict.fromkeys(map(str, key["versions"]), 1_764_000_000)
        return {**shown, "keys": times, "latest_version": max(key["versions"])}

    def _encrypt(self, key: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        version = body.get("key_version") or max(key["versions"])
        nonce = os.urandom(12)
        cipher = self._cipher(key, version, body)
        sealed = nonce + cipher.encrypt(nonce, b64decode(body["plaintext"]), self._associated(body))
        return {"ciphertext": f"vault:v{version}:{b64encode(sealed).decode()}", "key_version": version}

    def _decrypt(self, key: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        prefix, version, text = body["ciphertext"].split(":")
        if prefix != "vault":
            raise ValueError("invalid ciphertext: no prefix")
        if int(version[1:]) < key["min_decryption_version"]:
            raise ValueError("ciphertext or signature version is disallowed by policy (too old)")
        sealed = b64decode(text)
        cipher = self._cipher(key, int(version[1:]), body)
        try:
            plaintext = cipher.decrypt(sealed[:12], sealed[12:], self._associated(body))
        except InvalidTag:
            raise ValueError("cipher: message authentication failed") from None
        return {"plaintext": b64encode(plaintext).decode()}

    def _rotate(self, key: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
        key["versions"][max(key["versions"]) + 1] = os.urandom(32)
        return self._keys(key, {})

    def _config(self, key: dict[str, Any], body: dict[str, Any]) -> None:
        key |= {k: v for k, v in body.items() if k in {"min_decryption_version", "min_encryption_version"}}
        if 0 < key["min_encryption_version"] < key["min_decryption_version"]:
            raise ValueError("min encryption version must be greater than or equal to min decryption version")

    def _trim(self, key: dict[str, Any], body: dict[str, Any]) -> None:
        oldest = body["min_available_version"]
        if not key["min_encryption_version"]:
            raise ValueError(
                "minimum available version cannot be set when minimum encryption version is not set"
            )
        if oldest > min(key["min_encryption_version"], key["min_decryption_version"], max(key["versions"])):
            raise ValueError("minimum available version cannot be greater than the others")
        key["min_available_version"] = oldest
        key["versions"] = {version: kek for version, kek in key["versions"].items() if version >= oldest}

    def _cipher(self, key: dict[str, Any], version: int, body: dict[str, Any]) -> AESGCM:
        kek = key["versions"][version]
        if not key["derived"]:
            return AESGCM(kek)
        if "context" not in body:
            raise ValueError("missing 'context' for key derivation; the key was created using a derived key")
        kdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b64decode(body["context"]))
        return AESGCM(kdf.derive(kek))

    def _associated(self, body: dict[str, Any]) -> bytes | None:
        return b64decode(body["associated_data"]) if "associated_data" in body else None

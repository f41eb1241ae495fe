"""AWS KMS as its API documents it (JSON 1.1, targets `TrentService.*`), for symmetric keys.

A request must be signed (SigV4); the signature itself is not checked.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
import json
import os
import re
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.serve_app.keys.key_service import Answer

_SIGNED = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/[a-z0-9-]+/kms/aws4_request, SignedHeaders=[a-z0-9;-]+, Signature=[0-9a-f]{64}"
)
_ACCOUNT = "arn:aws:kms:eu-central-1:111122223333:key/"


class Refusal(Exception):
    """An error by its code in the API."""


class Kms:
    """Keys by id, and aliases of them; every key is AES-256-GCM inside."""

    content_type = "application/x-amz-json-1.1"

    def __init__(self) -> None:
        self.keys: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.forbidden: set[str] = set()
        self.seen: list[dict[str, Any]] = []

    def make_key(self, key_id: str, *, alias: str | None = None, spec: str = "SYMMETRIC_DEFAULT") -> None:
        self.keys[key_id] = {"material": os.urandom(32), "enabled": True, "spec": spec}
        if alias:
            self.aliases[alias] = key_id

    def fault(self, status: int) -> dict[str, Any]:
        code = {400: "ThrottlingException", 500: "KMSInternalException"}.get(status, "ServiceUnavailable")
        return {"__type": code, "message": f"fault {status}"}

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        self.seen.append({"path": path, "headers": dict(headers), "body": body})
        operation = headers.get("X-Amz-Target", "").removeprefix("TrentService.")
        operations = {"Encrypt": self._encrypt, "Decrypt": self._decrypt, "DescribeKey": self._describe}
        try:
            self._check(operation, headers)
            return 200, operations[operation](body)
        except Refusal as refusal:
            return 400, {"__type": str(refusal), "message": "refused"}

    def _check(self, operation: str, headers: Mapping[str, str]) -> None:
        if not _SIGNED.fullmatch(headers.get("Authorization", "")) or "X-Amz-Date" not in headers:
            raise Refusal("MissingAuthenticationTokenException")
        if operation in self.forbidden:
            raise Refusal("AccessDeniedException")

    def _key(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        name = body["KeyId"].removeprefix(_ACCOUNT)
        key_id = self.aliases.get(name, name)
        if key_id not in self.keys:
            raise Refusal("NotFoundException")
        return key_id, self.keys[key_id]

    def _enabled(self, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        key_id, key = self._key(body)
        if not key["enabled"]:
            raise Refusal("DisabledException")
        return key_id, key

    def _describe(self, body: dict[str, Any]) -> dict[str, Any]:
        key_id, key = self._key(body)
        metadata = {
            "KeyId": key_id,
            "Arn": _ACCOUNT + key_id,
            "Enabled": key["enabled"],
            "KeySpec": key["spec"],
            "KeyUsage": "ENCRYPT_DECRYPT",
            "KeyState": "Enabled" if key["enabled"] else "Disabled",
        }
        return {"KeyMetadata": metadata}

    def _encrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        key_id, key = self._enabled(body)
        nonce = os.urandom(12)
        sealed = AESGCM(key["material"]).encrypt(nonce, b64decode(body["Plaintext"]), _context(body))
        blob = len(key_id).to_bytes(2, "big") + key_id.encode() + nonce + sealed
        return {"CiphertextBlob": b64encode(blob).decode(), "KeyId": _ACCOUNT + key_id}

    def _decrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        blob = b64decode(body["CiphertextBlob"])
        length = int.from_bytes(blob[:2], "big")
        made_by, sealed = blob[2 : 2 + length].decode("latin-1"), blob[2 + length :]
        if made_by not in self.keys:
            raise Refusal("InvalidCiphertextException")
        key_id, key = self._enabled(body)
        if key_id != made_by:
            raise Refusal("IncorrectKeyException")
        try:
            plaintext = AESGCM(key["material"]).decrypt(sealed[:12], sealed[12:], _context(body))
        except (InvalidTag, ValueError):
            raise Refusal("InvalidCiphertextException") from None
        return {"KeyId": _ACCOUNT + key_id, "Plaintext": b64encode(plaintext).decode()}


def _context(body: dict[str, Any]) -> bytes:
    return json.dumps(body.get("EncryptionContext", {}), sort_keys=True).encode()

"""Key services on loopback, as their APIs document them: Vault's transit engine and AWS KMS, in trouble when told so."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import os
import re
import socket
from threading import Thread
import time
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Answer = tuple[int, dict[str, Any] | None]


class KeyService:
    """Serves a Vault or Kms over HTTP; `faults` is what the next requests get instead: a status, or seconds to wait.

    While `down`, connections are refused. `requests` counts those that arrived.
    """

    def __init__(self, service: Vault | Kms) -> None:
        self.service = service
        self.faults: list[int | float] = []
        self.requests = 0
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        """Listen, on the port that it had before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests += 1
                status, document = outer._reply(self.path, dict(self.headers.items()), body)
                content = b"" if document is None else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", outer.service.content_type)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def handle(self) -> None:
                outer._connections.add(self.connection)
                try:
                    super().handle()
                except OSError:  # a client that would wait no longer, or `down`
                    self.close_connection = True
                finally:
                    outer._connections.discard(self.connection)

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Stop listening, and break the connections that there are."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in tuple(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return fault, self.service.fault(fault)
        time.sleep(fault or 0)
        return self.service.answer(path, headers, json.loads(body or b"{}"))


_PATH = re.compile(r"/v1/(?P<mount>[^/]+)/(?P<verb>encrypt|decrypt|keys)/(?P<key>[^/]+)(/(?P<action>\w+))?")


class Vault:
    """One mount of AES-256-GCM keys by name; a request without the token is answered 403, as one that the policy forbids."""

    content_type = "application/json"

    def __init__(self) -> None:
        self.token = "s.right"
        self.forbidden: set[str] = set()
        self.keys: dict[str, dict[str, Any]] = {}

    def make_key(self, name: str, *, kind: str = "aes256-gcm96", derived: bool = False) -> None:
        """Add a key with one version."""
        oldest = {"min_decryption_version": 1, "min_encryption_version": 0, "min_available_version": 0}
        made = {"name": name, "type": kind, "derived": derived, "versions": {1: os.urandom(32)}}
        self.keys[name] = made | oldest

    def fault(self, status: int) -> dict[str, Any]:
        return {"errors": ["Vault is sealed" if status == 503 else f"fault {status}"]}

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
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
            raise ValueError("minimum available version cannot be set before minimum encryption version")
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


_SIGNED = re.compile(
    r"AWS4-HMAC-SHA256 Credential=[^/]+/\d{8}/[a-z0-9-]+/kms/aws4_request, SignedHeaders=[a-z0-9;-]+, Signature=[0-9a-f]{64}"
)
_ACCOUNT = "arn:aws:kms:eu-central-1:111122223333:key/"


class Refusal(Exception):
    """An error by its code in the API."""


class Kms:
    """JSON 1.1, targets `TrentService.*`: symmetric keys by id or alias. A request must be signed (SigV4; not checked)."""

    content_type = "application/x-amz-json-1.1"

    def __init__(self) -> None:
        self.keys: dict[str, dict[str, Any]] = {}
        self.forbidden: set[str] = set()
        self.seen: list[dict[str, Any]] = []

    def make_key(self, key_id: str, *, alias: str | None = None, spec: str = "SYMMETRIC_DEFAULT") -> None:
        key = {"id": key_id, "material": os.urandom(32), "enabled": True, "spec": spec}
        self.keys |= dict.fromkeys(filter(None, (key_id, alias)), key)

    def fault(self, status: int) -> dict[str, Any]:
        code = {400: "ThrottlingException", 500: "KMSInternalException"}.get(status, "ServiceUnavailable")
        return {"__type": code, "message": f"fault {status}"}

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        self.seen.append({"path": path, "headers": dict(headers), "body": body})
        operation = headers.get("X-Amz-Target", "").removeprefix("TrentService.")
        if not _SIGNED.fullmatch(headers.get("Authorization", "")) or "X-Amz-Date" not in headers:
            return 400, {"__type": "MissingAuthenticationTokenException"}
        if operation in self.forbidden:
            return 400, {"__type": "AccessDeniedException"}
        operations = {"Encrypt": self._encrypt, "Decrypt": self._decrypt, "DescribeKey": self._describe}
        try:
            return 200, operations[operation](body)
        except Refusal as refusal:
            return 400, {"__type": str(refusal), "message": "refused"}

    def _key(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["KeyId"].removeprefix(_ACCOUNT)
        if name not in self.keys:
            raise Refusal("NotFoundException")
        return self.keys[name]

    def _enabled(self, body: dict[str, Any]) -> dict[str, Any]:
        if not (key := self._key(body))["enabled"]:
            raise Refusal("DisabledException")
        return key

    def _describe(self, body: dict[str, Any]) -> dict[str, Any]:
        key = self._key(body)
        state = "Enabled" if key["enabled"] else "Disabled"
        metadata = {"KeyId": key["id"], "Arn": _ACCOUNT + key["id"], "Enabled": key["enabled"]}
        usage = {"KeyState": state, "KeySpec": key["spec"], "KeyUsage": "ENCRYPT_DECRYPT"}
        return {"KeyMetadata": metadata | usage}

    def _encrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        key, nonce = self._enabled(body), os.urandom(12)
        sealed = AESGCM(key["material"]).encrypt(nonce, b64decode(body["Plaintext"]), _context(body))
        blob = len(key["id"]).to_bytes(2, "big") + key["id"].encode() + nonce + sealed
        return {"CiphertextBlob": b64encode(blob).decode(), "KeyId": _ACCOUNT + key["id"]}

    def _decrypt(self, body: dict[str, Any]) -> dict[str, Any]:
        blob = b64decode(body["CiphertextBlob"])
        length = int.from_bytes(blob[:2], "big")
        made_by, sealed = blob[2 : 2 + length].decode("latin-1"), blob[2 + length :]
        if made_by not in self.keys:
            raise Refusal("InvalidCiphertextException")
        key = self._enabled(body)
        if key["id"] != made_by:
            raise Refusal("IncorrectKeyException")
        try:
            plaintext = AESGCM(key["material"]).decrypt(sealed[:12], sealed[12:], _context(body))
        except (InvalidTag, ValueError):
            raise Refusal("InvalidCiphertextException") from None
        return {"KeyId": _ACCOUNT + key["id"], "Plaintext": b64encode(plaintext).decode()}


def _context(body: dict[str, Any]) -> bytes:
    return json.dumps(body.get("EncryptionContext", {}), sort_keys=True).encode()

"""Key-encryption keys in HashiCorp Vault's transit engine, or OpenBao's: they never leave it.

    vault://HOST[:8200]/MOUNT/KEY[?namespace=NAME]     HTTPS; $VAULT_CACERT names the CA's certificate
    vault+http://127.0.0.1[:8200]/MOUNT/KEY            plain, on this machine only (a Vault Agent)

The token's policy: `update` on MOUNT/encrypt/KEY and MOUNT/decrypt/KEY, `read` on MOUNT/keys/KEY;
and for an operator, `update` on MOUNT/keys/KEY/{rotate,config,trim}.
Source of every path and field: developer.hashicorp.com/vault/api-docs/secret/transit.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
import os
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import hvac
from hvac import exceptions
import requests

from serve_app.domain.errors import Conflict, IntegrityError, InvalidSetting, KeyProviderUnavailable
from serve_app.keys.keyring import DATA_KEY_BYTES, KeyProvider, WrappedKey
from serve_app.keys.providers.retries import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, RetryPolicy, Unanswered

_PORT = 8200
_CIPHERTEXT = re.compile(rb"vault:v([1-9][0-9]{0,9}):[A-Za-z0-9+/]+={0,2}")
#: Vault's ciphers that authenticate associated data.
_CIPHERS = frozenset({"aes128-gcm96", "aes256-gcm96", "chacha20-poly1305"})

# Not reached, or Vault in trouble, sealed, standing by, throttling or not yet caught up; nothing that we asked wrongly.
_COME_BACK = (
    requests.RequestException,
    exceptions.BadGateway,
    exceptions.InternalServerError,
    exceptions.PreconditionFailed,
    exceptions.RateLimitExceeded,
    exceptions.UnexpectedError,
    exceptions.VaultDown,
    exceptions.VaultNotInitialized,
)


@dataclass(frozen=True, slots=True)
class VaultAddress:
    """A key in a transit engine: the server's URL, the engine's mount point, the key's name."""

    url: str
    mount: str
    key: str
    namespace: str | None

    @classmethod
    def parse(cls, text: str) -> VaultAddress:
        """Read a `vault:` URL. InvalidSetting when it is none, or would send keys over a network in clear."""
        parts = urlsplit(text)
        mount, _, key = parts.path.strip("/").rpartition("/")
        try:
            host, port = parts.hostname, parts.port or _PORT
        except ValueError:
            host, port = None, _PORT
        if not (host and mount and key) or parts.username is not None:
            raise InvalidSetting("DERM_KEY_PROVIDER is not vault://HOST[:PORT]/MOUNT/KEY.")
        plain = parts.scheme == "vault+http"
        if plain and not _is_this_machine(host):
            raise InvalidSetting("vault+http:// is for this machine only: data keys would cross a network.")
        shown = f"[{host}]" if ":" in host else host
        url = f"{'http' if plain else 'https'}://{shown}:{port}"
        return cls(url, mount, key, namespace=parse_qs(parts.query).get("namespace", [None])[0])


class VaultTransit(KeyProvider):
    """One key of a transit engine, versioned by Vault; `token` is asked before every request.

    A wrapped key is Vault's own ciphertext ("vault:v1:…"). The data key's id is its associated
    data, and its context, too, where the key derives.
    """

    def __init__(self, address: VaultAddress, token: Callable[[], str]) -> None:
        self._address = address
        self._token = token
        self._session = requests.Session()
        # Neither a proxy nor a .netrc of the environment belongs between us and the keys.
        self._session.trust_env = False
        self._session.verify = os.environ.get("VAULT_CACERT", "") or True
        self._retries = RetryPolicy("Vault")
        key = self._ask("read_key")
        if key["type"] not in _CIPHERS:
            raise InvalidSetting(
                f"{self} is of type {key['type']}: make one of type aes256-gcm96, which binds a wrapped key to its image."
            )
        self._derives = bool(key.get("derived"))

    def __str__(self) -> str:
        return f"Vault transit key {self._address.mount}/{self._address.key} at {self._address.url}"

    @property
    def current_version(self) -> int:
        """The version that wraps from now on."""
        return int(self._ask("read_key")["latest_version"])

    @property
    def versions(self) -> tuple[int, ...]:
        """All versions that Vault still decrypts under, oldest first."""
        key = self._ask("read_key")
        return tuple(sorted(v for v in map(int, key["keys"]) if v >= int(key["min_decryption_version"])))

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Have Vault encrypt a data key under its newest version, bound to its id."""
        answer = self._ask("encrypt_data", data_key_id, plaintext=_text(data_key))
        wrapped = str(answer["ciphertext"]).encode()
        return WrappedKey(wrapped, _version_of(wrapped))

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Have Vault decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        if _version_of(wrapped_key.wrapped) != wrapped_key.key_version:
            raise IntegrityError(f"Data key {data_key_id} was wrapped under another version than it says")
        answer = self._ask("decrypt_data", data_key_id, ciphertext=wrapped_key.wrapped.decode())
        data_key = b64decode(answer["plaintext"])
        if len(data_key) != DATA_KEY_BYTES:
            raise IntegrityError(f"Vault did not wrap data key {data_key_id}")
        return data_key

    def rotate(self) -> int:
        """Have Vault make a new version, which wraps from now on; returns it."""
        self._ask("rotate_key")
        return self.current_version

    def check_retirement(self, version: int) -> None:
        """NotFound when Vault has none of that version, Conflict when it is the current one or not the oldest."""
        super().check_retirement(version)
        if version != (oldest := self.versions[0]):
            raise Conflict(f"Vault destroys the oldest version first: retire {oldest} before {version}.")

    def retire(self, version: int) -> None:
        """Have Vault destroy a version for good; it destroys from the oldest on only."""
        self.check_retirement(version)
        # Vault trims only what it may neither encrypt nor decrypt under any more. Two calls, for hvac
        # takes both limits at once only where they differ.
        oldest = version + 1
        self._ask("update_key_configuration", min_encryption_version=oldest)
        self._ask("update_key_configuration", min_decryption_version=oldest)
        self._ask("trim_key", min_version=oldest)

    def _ask(self, method: str, data_key_id: UUID | None = None, **fields: object) -> dict[str, Any]:
        """Call a method of hvac's Transit on our key; `data_key_id` binds what is encrypted or decrypted."""
        fields |= {"name": self._address.key, "mount_point": self._address.mount}
        if data_key_id is not None:
            binding = _text(b"derm-cds data key " + data_key_id.bytes)
            fields |= {"associated_data": binding, **({"context": binding} if self._derives else {})}

        def attempt() -> dict[str, Any]:
            client = hvac.Client(
                url=self._address.url,
                token=self._token(),
                namespace=self._address.namespace,
                session=self._session,
                timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                allow_redirects=False,  # the token would go along
            )
            return _answer(
                method.partition("_")[0], partial(getattr(client.secrets.transit, method), **fields)
            )

        return self._retries.ask(attempt)


def _answer(operation: str, request: Callable[[], Any]) -> dict[str, Any]:
    """Send one request, and sort what may come back; no cause is kept, for causes hold requests."""
    try:
        answer = request()
    except _COME_BACK as error:
        raise Unanswered(type(error).__name__) from None
    except exceptions.InvalidRequest:
        if operation == "decrypt":
            raise IntegrityError("Vault did not wrap this data key, or not for this id") from None
        raise KeyProviderUnavailable(f"Vault refuses to {operation} (400): look at its audit log.") from None
    except (exceptions.Forbidden, exceptions.Unauthorized):
        raise KeyProviderUnavailable(
            f"Vault refuses the token to {operation} (403): renew it, or extend its policy."
        ) from None
    except exceptions.InvalidPath:
        raise KeyProviderUnavailable("Vault has no such transit key (404): see DERM_KEY_PROVIDER.") from None
    if isinstance(answer, dict):
        return dict(answer.get("data") or {})
    if answer.status_code == requests.codes.no_content:
        return {}
    raise Unanswered(f"HTTP {answer.status_code}")


def _version_of(wrapped: bytes) -> int:
    match = _CIPHERTEXT.fullmatch(wrapped)
    if match is None:
        raise IntegrityError(
            "This data key was not wrapped by Vault: is DERM_KEY_PROVIDER the one it was made with?"
        )
    return int(match[1])


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(content: bytes) -> str:
    return b64encode(content).decode()

"""Key-encryption keys: what wraps the data keys.

A key-encryption key (KEK) never leaves its provider; the key store only ever holds what it
wrapped, and the version of the KEK that did.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
from typing import Protocol
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from serve_app.domain.errors import IntegrityError
from serve_app.security.private_files import locked_folder, read_private, write_private

_NONCE_BYTES = 12
_KEK_BYTES = 32


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as the key store holds it: encrypted under the KEK of `key_version`."""

    wrapped: bytes = field(repr=False)
    key_version: int


class KeyProvider(Protocol):
    """Whoever holds the KEKs: a file here; Vault and AWS KMS speak the same words."""

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Encrypt a data key under the current KEK, bound to its id."""
        ...

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        ...


class FileKeyring:
    """KEKs in one JSON file, mode 0600 in a folder 0700, made at first start by whoever comes first.

    The file: {"current": 1, "keys": {"1": base64 of 32 bytes}}. Wrapping is AES-256-GCM under
    a random nonce; data key id (16 bytes) and key version (4) are authenticated with it.
    IntegrityError when the file is open to other users or is no keyring.
    """

    def __init__(self, path: Path) -> None:
        with locked_folder(path.parent):
            if not path.exists():
                write_private(path, _new_keyring())
            content = read_private(path)
        try:
            self._current, self._keks = _parse(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The cause could quote a key.
            raise IntegrityError(f"{path} is not a keyring: {type(error).__name__}") from None

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Encrypt a data key under the current KEK, bound to its id."""
        nonce = os.urandom(_NONCE_BYTES)
        binding = _binding(data_key_id, self._current)
        ciphertext = self._keks[self._current].encrypt(nonce, data_key, binding)
        return WrappedKey(nonce + ciphertext, self._current)

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        version = wrapped_key.key_version
        nonce, ciphertext = wrapped_key.wrapped[:_NONCE_BYTES], wrapped_key.wrapped[_NONCE_BYTES:]
        try:
            return self._keks[version].decrypt(nonce, ciphertext, _binding(data_key_id, version))
        except KeyError:
            raise IntegrityError(f"The keyring has no key of version {version}") from None
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(f"The keyring did not wrap data key {data_key_id}") from error


def _binding(data_key_id: UUID, key_version: int) -> bytes:
    return data_key_id.bytes + key_version.to_bytes(4, "big")


def _new_keyring() -> bytes:
    kek = b64encode(AESGCM.generate_key(_KEK_BYTES * 8)).decode()
    return json.dumps({"current": 1, "keys": {"1": kek}}).encode()


def _parse(content: bytes) -> tuple[int, Mapping[int, AESGCM]]:
    document = json.loads(content)
    keks = {int(version): b64decode(kek, validate=True) for version, kek in document["keys"].items()}
    if any(len(kek) != _KEK_BYTES for kek in keks.values()):
        raise ValueError("a key is not of 32 bytes")
    current = int(document["current"])
    if current not in keks:
        raise KeyError(current)
    return current, {version: AESGCM(kek) for version, kek in keks.items()}

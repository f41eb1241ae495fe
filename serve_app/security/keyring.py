"""Key-encryption keys: what wraps the data keys.

A key-encryption key (KEK) never leaves its provider; the key store only ever holds what it
wrapped, and the version of the KEK that did.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
import json
import os
from pathlib import Path
from typing import Protocol
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from serve_app.domain.errors import Conflict, IntegrityError, KeyProviderUnavailable, NotFound
from serve_app.security.private_files import locked_folder, read_private, write_private

_NONCE_BYTES = 12
_KEK_BYTES = 32


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as the key store holds it: encrypted under the KEK of `key_version`."""

    wrapped: bytes = field(repr=False)
    key_version: int


class KeyProvider(Protocol):
    """Whoever holds the KEKs: a file here; Vault and AWS KMS in `key_providers` speak the same words.

    `str()` names it for people. KeyProviderUnavailable when it does not answer, or refuses.
    """

    @property
    def current_version(self) -> int:
        """The version that wraps from now on."""
        ...

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Encrypt a data key under the current KEK, bound to its id."""
        ...

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        ...

    @property
    def versions(self) -> tuple[int, ...]:
        """All versions that still unwrap, oldest first."""
        ...

    def rotate(self) -> int:
        """Make a new version, which wraps from now on; returns it. Conflict where that is done elsewhere."""
        ...

    def retire(self, version: int) -> None:
        """Destroy an old version, and with it whatever it wrapped. Conflict where that cannot be."""
        ...


class FileKeyring:
    """KEKs in one JSON file, mode 0600 in a folder 0700, made at first start by whoever comes first.

    The file: {"current": 1, "keys": {"1": base64 of 32 bytes}}. Wrapping is AES-256-GCM under
    a random nonce; data key id (16 bytes) and key version (4) are authenticated with it. A file
    that another process rotated is read again before the next wrap.
    KeyProviderUnavailable while the file is gone or cannot be read: put back, it serves again at once.
    IntegrityError when it is open to other users or is no keyring.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with locked_folder(path.parent):
            if not path.exists():
                write_private(path, _write(1, {1: AESGCM.generate_key(_KEK_BYTES * 8)}))
            self._read()

    def __str__(self) -> str:
        return f"keyring {self._path}"

    @property
    def current_version(self) -> int:
        """The version that wraps from now on."""
        self._read_if_changed()
        return self._current

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Encrypt a data key under the current KEK, bound to its id."""
        self._read_if_changed()
        current, kek = self._current, self._keks[self._current]
        nonce = os.urandom(_NONCE_BYTES)
        ciphertext = AESGCM(kek).encrypt(nonce, data_key, _binding(data_key_id, current))
        return WrappedKey(nonce + ciphertext, current)

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        version = wrapped_key.key_version
        if version not in self._keks:
            self._read_if_changed()
        nonce, ciphertext = wrapped_key.wrapped[:_NONCE_BYTES], wrapped_key.wrapped[_NONCE_BYTES:]
        try:
            return AESGCM(self._keks[version]).decrypt(nonce, ciphertext, _binding(data_key_id, version))
        except KeyError:
            raise IntegrityError(f"The keyring has no key of version {version}") from None
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(f"The keyring did not wrap data key {data_key_id}") from error

    def rotate(self) -> int:
        """Make a new KEK and have it wrap from now on, in every process; returns its version.

        What older versions wrapped can still be opened.
        """
        with locked_folder(self._path.parent):
            self._read()
            version = max(self._keks) + 1
            keks = {**self._keks, version: AESGCM.generate_key(_KEK_BYTES * 8)}
            write_private(self._path, _write(version, keks))
            self._read()
        return version

    def retire(self, version: int) -> None:
        """Destroy an old KEK: what it wrapped, in this key store or in a backup of it, is then lost.

        Conflict when it is the current one, NotFound when there is none of that version.
        """
        with locked_folder(self._path.parent):
            self._read()
            if version not in self._keks:
                raise NotFound(f"The keyring has no key of version {version}.")
            if version == self._current:
                raise Conflict(f"Version {version} is the current one: rotate and rewrap first.")
            keks = {kept: kek for kept, kek in self._keks.items() if kept != version}
            write_private(self._path, _write(self._current, keks))
            self._read()

    @property
    def versions(self) -> tuple[int, ...]:
        """All versions there are, oldest first."""
        self._read_if_changed()
        return tuple(sorted(self._keks))

    def _read_if_changed(self) -> None:
        with self._unreadable():
            stamp = _stamp(self._path)
        if stamp != self._stamp:
            self._read()

    def _read(self) -> None:
        with self._unreadable():
            stamp, content = _stamp(self._path), read_private(self._path)
        try:
            self._current, self._keks = _parse(content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The cause could quote a key.
            raise IntegrityError(f"{self._path} is not a keyring: {type(error).__name__}") from None
        self._stamp = stamp

    @contextmanager
    def _unreadable(self) -> Iterator[None]:
        """Turn the system's refusal into KeyProviderUnavailable: a share not mounted, a file moved, a failing disk."""
        try:
            yield
        except OSError as error:
            raise KeyProviderUnavailable(
                f"{self} cannot be read ({type(error).__name__}); nothing was stored, try again."
            ) from error


def _stamp(path: Path) -> tuple[int, int]:
    """What differs once the file was replaced: `write_private` always makes a new one."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _binding(data_key_id: UUID, key_version: int) -> bytes:
    return data_key_id.bytes + key_version.to_bytes(4, "big")


def _write(current: int, keks: Mapping[int, bytes]) -> bytes:
    keys = {str(version): b64encode(kek).decode() for version, kek in sorted(keks.items())}
    return json.dumps({"current": current, "keys": keys}).encode()


def _parse(content: bytes) -> tuple[int, Mapping[int, bytes]]:
    document = json.loads(content)
    keks = {int(version): b64decode(kek, validate=True) for version, kek in document["keys"].items()}
    if any(len(kek) != _KEK_BYTES for kek in keks.values()):
        raise ValueError("a key is not of 32 bytes")
    current = int(document["current"])
    if current not in keks:
        raise KeyError(current)
    return current, keks

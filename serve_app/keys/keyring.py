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
from serve_app.private_files import locked_folder, read_private, replace_secret, write_private

#: Of every data key that a provider wraps.
DATA_KEY_BYTES = 32

_KEK_BYTES, _NONCE_BYTES = 32, 12


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A data key as the key store holds it: encrypted under the KEK of `key_version`."""

    wrapped: bytes = field(repr=False)
    key_version: int


class Keys(Protocol):
    """Keys that wrap data keys, and unwrap them again."""

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


class KeyProvider(Keys, Protocol):
    """Holds the KEKs: a file here, Vault and AWS KMS in `providers`.

    `str()` names it for people. For many threads. KeyProviderUnavailable when it does not answer in time, or refuses.
    """

    def now(self) -> Keys:
        """The keys that wrap now; the same object (here: this one) until others are in their place."""
        return self

    @property
    def current_version(self) -> int:
        """The version that wraps from now on."""
        return self.now().current_version

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Encrypt a data key under the current KEK, bound to its id."""
        return self.now().wrap(data_key, data_key_id)

    @property
    def versions(self) -> tuple[int, ...]:
        """All versions that still unwrap, oldest first."""
        ...

    def rotate(self) -> int:
        """Make a new version, which wraps from now on; returns it. Conflict where that is done elsewhere."""
        ...

    def check_retirement(self, version: int) -> None:
        """See that a version can be destroyed: NotFound when there is none, Conflict where it cannot be."""
        if version not in self.versions:
            raise NotFound(f"{self} has no version {version}.")
        if version == self.current_version:
            raise Conflict(f"Version {version} is the current one: rotate and rewrap first.")

    def retire(self, version: int) -> None:
        """Destroy an old version, and with it whatever it wrapped; raises as `check_retirement`.

        `KeyStore.retire` comes first, in every key store that these keys wrap for.
        """
        ...

    def register(self, store_id: UUID, path: Path) -> None:  # noqa: ARG002 - there is no place for it, but a file's
        """Note a key store that these keys wrap for, where there is a place for it."""
        return

    @property
    def key_stores(self) -> Mapping[UUID, Path] | None:
        """Every key store that these keys wrap for, and where it was last; None where nobody notes it."""
        return None


@dataclass(frozen=True, slots=True)
class _Ring:
    """A keyring's file as it was read: which one (`stamp`), and what was in it."""

    stamp: tuple[int, int]
    current_version: int
    keks: Mapping[int, bytes] = field(repr=False)
    key_stores: Mapping[UUID, Path]

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        nonce, current = os.urandom(_NONCE_BYTES), self.current_version
        ciphertext = AESGCM(self.keks[current]).encrypt(nonce, data_key, _binding(data_key_id, current))
        return WrappedKey(nonce + ciphertext, current)

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        version = wrapped_key.key_version
        nonce, ciphertext = wrapped_key.wrapped[:_NONCE_BYTES], wrapped_key.wrapped[_NONCE_BYTES:]
        try:
            return AESGCM(self.keks[version]).decrypt(nonce, ciphertext, _binding(data_key_id, version))
        except KeyError:
            raise IntegrityError(f"The keyring has no key of version {version}") from None
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(f"The keyring did not wrap data key {data_key_id}") from error


class FileKeyring(KeyProvider):
    """KEKs in one JSON file, mode 0600 in a folder 0700.

    The file: {"current": 1, "keys": {"1": base64 of 32 bytes}, "key_stores": {id: path}}. Wrapping is
    AES-256-GCM under a random nonce; data key id (16 bytes) and key version (4) are authenticated with
    it. A file that another process rotated is read again before the next wrap.
    KeyProviderUnavailable while the file is gone, cannot be read, or has another key where this process
    knows one: put back, it serves again at once. It is never made anew here, for what a new one wrapped
    would be lost with the old one's return. IntegrityError when it is open to other users or is no keyring.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._unreadable(), locked_folder(path.parent):
            self._ring = self._read()

    @classmethod
    def make(cls, path: Path) -> FileKeyring:
        """Open the keyring, made if there is none: at the first start, before anything was wrapped."""
        with locked_folder(path.parent):
            if not path.exists():
                write_private(path, _write(1, {1: AESGCM.generate_key(_KEK_BYTES * 8)}, {}))
        return cls(path)

    def __str__(self) -> str:
        return f"keyring {self._path}"

    def now(self) -> Keys:
        """The keyring as its file is now; the same object until the file is another."""
        with self._unreadable():
            stamp = _stamp(self._path)
        if stamp != self._ring.stamp:
            self._adopt(self._read())
        return self._ring

    def unwrap(self, wrapped_key: WrappedKey, data_key_id: UUID) -> bytes:
        """Decrypt a data key; IntegrityError when it, its id or its version is not as wrapped."""
        # What this process knows already needs no file: images open while it is away.
        known = wrapped_key.key_version in self._ring.keks
        return (self._ring if known else self.now()).unwrap(wrapped_key, data_key_id)

    def rotate(self) -> int:
        """Make a new KEK and have it wrap from now on, in every process; returns its version.

        What older versions wrapped can still be opened.
        """
        with locked_folder(self._path.parent):
            self._adopt(self._read())
            version, kek = max(self._ring.keks) + 1, AESGCM.generate_key(_KEK_BYTES * 8)
            self._replace(version, {**self._ring.keks, version: kek}, self._ring.key_stores)
        return version

    def retire(self, version: int) -> None:
        """Destroy an old KEK: what it wrapped, in a key store or in a backup of one, is then lost.

        Conflict when it is the current one, NotFound when there is none of that version.
        """
        with locked_folder(self._path.parent):
            self._adopt(self._read())
            self.check_retirement(version)
            ring = self._ring
            keks = {kept: kek for kept, kek in ring.keks.items() if kept != version}
            self._replace(ring.current_version, keks, ring.key_stores)

    def register(self, store_id: UUID, path: Path) -> None:
        """Note a key store in the file. KeyProviderUnavailable where that cannot be written."""
        path = path.resolve()
        if self.key_stores.get(store_id) == path:
            return
        with self._unreadable("written"), locked_folder(self._path.parent):
            self._adopt(self._read())
            ring = self._ring
            # Whichever store was at this path is there no more.
            others = {other: at for other, at in ring.key_stores.items() if at != path}
            self._replace(ring.current_version, ring.keks, {**others, store_id: path})

    @property
    def key_stores(self) -> Mapping[UUID, Path]:
        """Every key store that was opened under this keyring, and where it was last."""
        self.now()
        return self._ring.key_stores

    @property
    def versions(self) -> tuple[int, ...]:
        """All versions there are, oldest first."""
        self.now()
        return tuple(sorted(self._ring.keks))

    def _read(self) -> _Ring:
        with self._unreadable():
            stamp, content = _stamp(self._path), read_private(self._path)
            if stamp != _stamp(
                self._path
            ):  # replaced meanwhile, and what was read may be overwritten already
                return self._read()
        try:
            return _Ring(stamp, *_parse(content))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            # The cause could quote a key.
            raise IntegrityError(f"{self._path} is not a keyring: {type(error).__name__}") from None

    def _replace(self, current: int, keks: Mapping[int, bytes], key_stores: Mapping[UUID, Path]) -> None:
        replace_secret(self._path, _write(current, keks, key_stores))
        self._adopt(self._read())

    def _adopt(self, ring: _Ring) -> None:
        """Go on with what was read, unless it is no later state of what this process knows: keys never change."""
        if any(ring.keks.get(version, kek) != kek for version, kek in self._ring.keks.items()):
            raise KeyProviderUnavailable(
                f"{self} has other keys than before: it is another node's, or was made anew. "
                "Put this node's own back; nothing was stored."
            )
        self._ring = ring

    @contextmanager
    def _unreadable(self, what: str = "read") -> Iterator[None]:
        """Turn the system's refusal into KeyProviderUnavailable: a share not mounted, a file moved, a failing disk."""
        try:
            yield
        except OSError as error:
            raise KeyProviderUnavailable(
                f"{self} cannot be {what} ({type(error).__name__}); nothing was stored, try again."
            ) from error


def _stamp(path: Path) -> tuple[int, int]:
    """What differs once the file was replaced: `write_private` always makes a new one."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _binding(data_key_id: UUID, key_version: int) -> bytes:
    return data_key_id.bytes + key_version.to_bytes(4, "big")


def _write(current: int, keks: Mapping[int, bytes], key_stores: Mapping[UUID, Path]) -> bytes:
    keys = {str(version): b64encode(kek).decode() for version, kek in sorted(keks.items())}
    stores = {str(store_id): str(path) for store_id, path in key_stores.items()}
    return json.dumps({"current": current, "keys": keys, "key_stores": stores}).encode()


def _parse(content: bytes) -> tuple[int, Mapping[int, bytes], Mapping[UUID, Path]]:
    document = json.loads(content)
    keks = {int(version): b64decode(kek, validate=True) for version, kek in document["keys"].items()}
    if any(len(kek) != _KEK_BYTES for kek in keks.values()):
        raise ValueError("a key is not of 32 bytes")
    current = int(document["current"])
    if current not in keks:
        raise KeyError(current)
    stores = document.get("key_stores", {})  # one of an older version has none
    return current, keks, {UUID(store_id): Path(path) for store_id, path in stores.items()}

"""Signed checkpoints of the audit chain, outside the database: a log that was cut short shows.

A file of JSON lines: {"position", "hash", "at", "signature"}; the signature is Ed25519 (RFC 8032) over
position, hash and time. Copy the lines to a place that the service cannot write: an attacker who holds the
database, the file and the signing key can write history anew, but not the copies.

After a restore the log is shorter than what was signed, and rightly so. The checkpoint that says so has
"restored_after", signed as well: what was signed before, of any later position, no longer holds.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from serve_app.domain.errors import IntegrityError
from serve_app.private_files import locked_folder, read_private, write_private


@dataclass(frozen=True, slots=True)
class Seal:
    """The chain's state after `position` events: its hash, 32 bytes."""

    position: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint(Seal):
    """A seal as it was signed, and when.

    `restored_after`: the last position at which a restored chain agrees with what was signed before; None for
    every checkpoint that only follows the one before.
    """

    at: datetime
    restored_after: int | None = None

    @property
    def message(self) -> bytes:
        """What is signed."""
        restored = "" if self.restored_after is None else f"\nrestored after {self.restored_after}"
        return (
            f"derm-cds audit checkpoint\n{self.position}\n{self.hash.hex()}\n{self.at.isoformat()}{restored}"
        ).encode()


def in_force(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Leave out what a restore has overtaken; `checkpoints` and the answer are oldest first."""
    kept: list[Checkpoint] = []
    for checkpoint in checkpoints:
        if (last := checkpoint.restored_after) is not None:
            kept = [earlier for earlier in kept if earlier.position <= last]
        kept.append(checkpoint)
    return kept


class CheckpointLog:
    """Adds and reads checkpoints; the signing key is made at first use. For one process or many.

    IntegrityError when key or file is open to other users, or a line is not what was signed.
    """

    def __init__(self, file: Path, key: Path) -> None:
        self._file, self._key = file, key

    def add(self, head: Seal, *, restored_after: int | None = None) -> Checkpoint:
        """Sign and keep the chain's state; on disk when this returns."""
        checkpoint = Checkpoint(head.position, head.hash, datetime.now(UTC), restored_after)
        line = self.line(checkpoint) + "\n"
        with (
            locked_folder(self._file.parent),
            os.fdopen(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file,
        ):
            # A full disk leaves a line without its end, which was never acknowledged: the next must not join it.
            file.seek(_whole_lines(file.read()))
            file.truncate()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        return checkpoint

    def line(self, checkpoint: Checkpoint) -> str:
        """Write a checkpoint as a line of the file, with its signature (the same at each time)."""
        fields: dict[str, object] = {
            "position": checkpoint.position,
            "hash": checkpoint.hash.hex(),
            "at": checkpoint.at.isoformat(),
        }
        if checkpoint.restored_after is not None:
            fields["restored_after"] = checkpoint.restored_after
        fields["signature"] = b64encode(self._signer().sign(checkpoint.message)).decode()
        return json.dumps(fields)

    def read(self, public: Ed25519PublicKey | None = None) -> list[Checkpoint]:
        """Every checkpoint, oldest first, its signature checked by `public` (None: our own key).

        IntegrityError names the first bad line. A last line without its end is none: see `add`.
        """
        if not self._file.exists():
            return []
        content = read_private(self._file)
        return _parse(content[: _whole_lines(content)], public or self.public_key(), self._file)

    def public_key(self) -> Ed25519PublicKey:
        """The key that checks what is signed here; IntegrityError where nothing was signed, or its key is gone."""
        if not self._key.exists():
            raise IntegrityError(f"There is no {self._key}: the first checkpoint or backup makes it.")
        return self._signer().public_key()

    def _signer(self) -> Ed25519PrivateKey:
        return signing_key(self._key)


def signing_key(file: Path) -> Ed25519PrivateKey:
    """The node's own key, which signs checkpoints and backups; made at first use."""
    with locked_folder(file.parent):
        if not file.exists():
            write_private(file, Ed25519PrivateKey.generate().private_bytes_raw())
        return Ed25519PrivateKey.from_private_bytes(read_private(file))


def read_copy(file: Path, public: Ed25519PublicKey) -> list[Checkpoint]:
    """Read checkpoints that were copied away, oldest first; IntegrityError names the first line not signed by `public`."""
    return _parse(file.read_bytes(), public, file)


def write_public_key(public: Ed25519PublicKey) -> str:
    """Write a public key as PEM (SubjectPublicKeyInfo), as `read_public_key` reads it."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def read_public_key(file: Path) -> Ed25519PublicKey:
    """Read a public key from PEM; IntegrityError when it is none, or of another kind."""
    try:
        public = load_pem_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{file} is not a public key in PEM.") from error
    if not isinstance(public, Ed25519PublicKey):
        raise IntegrityError(f"{file} is not an Ed25519 key.")
    return public


def _whole_lines(content: bytes) -> int:
    """How many bytes the lines have that have their end."""
    return content.rfind(b"\n") + 1


def _parse(content: bytes, public: Ed25519PublicKey, file: Path) -> list[Checkpoint]:
    checkpoints = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            fields = json.loads(line)
            at, last = datetime.fromisoformat(fields["at"]), fields.get("restored_after")
            seal = int(fields["position"]), bytes.fromhex(fields["hash"])
            checkpoint = Checkpoint(*seal, at, None if last is None else int(last))
            public.verify(b64decode(fields["signature"], validate=True), checkpoint.message)
        except (ValueError, KeyError, TypeError, AttributeError, InvalidSignature) as error:
            raise IntegrityError(
                f"{file}, line {number}, is not a checkpoint that was signed here."
            ) from error
        checkpoints.append(checkpoint)
    return checkpoints

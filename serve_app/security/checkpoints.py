"""Signed checkpoints of the audit chain, outside the database: a log that was cut short shows.

A file of JSON lines: {"position", "hash", "at", "signature"}; the signature is Ed25519 (RFC 8032) over
position, hash and time. Copy the lines to a place that the service cannot write: an attacker who holds the
database, the file and the signing key can write history anew, but not the copies.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
import json
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from serve_app.domain.errors import IntegrityError
from serve_app.security.private_files import locked_folder, read_private, write_private


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The chain as it was at a moment: how many events, and the hash of the last one's seal."""

    position: int
    hash: bytes
    at: datetime

    @property
    def message(self) -> bytes:
        """What is signed."""
        return (
            f"derm-cds audit checkpoint\n{self.position}\n{self.hash.hex()}\n{self.at.isoformat()}".encode()
        )


class CheckpointLog:
    """Adds and reads checkpoints; the signing key is made at first use. For one process or many.

    IntegrityError when key or file is open to other users, or a line is not what was signed.
    """

    def __init__(self, file: Path, key: Path) -> None:
        self._file, self._key = file, key

    def add(self, position: int, chain_hash: bytes) -> Checkpoint:
        """Sign and keep the chain's state; on disk when this returns."""
        checkpoint = Checkpoint(position, chain_hash, datetime.now(UTC))
        line = {
            "position": checkpoint.position,
            "hash": checkpoint.hash.hex(),
            "at": checkpoint.at.isoformat(),
            "signature": b64encode(self._signer().sign(checkpoint.message)).decode(),
        }
        with locked_folder(self._file.parent):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return checkpoint

    def read(self) -> list[Checkpoint]:
        """Every checkpoint, its signature checked, oldest first. IntegrityError names the first bad line."""
        if not self._file.exists():
            return []
        public = self._signer().public_key()
        lines = read_private(self._file).splitlines()
        return [_parse(line, number, public, self._file) for number, line in enumerate(lines, 1)]

    def _signer(self) -> Ed25519PrivateKey:
        with locked_folder(self._key.parent):
            if not self._key.exists():
                write_private(self._key, Ed25519PrivateKey.generate().private_bytes_raw())
            return Ed25519PrivateKey.from_private_bytes(read_private(self._key))


def _parse(line: bytes, number: int, public: Ed25519PublicKey, file: Path) -> Checkpoint:
    try:
        fields = json.loads(line)
        checkpoint = Checkpoint(
            int(fields["position"]), bytes.fromhex(fields["hash"]), datetime.fromisoformat(fields["at"])
        )
        public.verify(b64decode(fields["signature"], validate=True), checkpoint.message)
    except (ValueError, KeyError, TypeError, InvalidSignature) as error:
        raise IntegrityError(f"{file}, line {number}, is not a checkpoint that was signed here.") from error
    return checkpoint

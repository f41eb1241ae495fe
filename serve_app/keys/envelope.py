"""The sealed image: one frame, one key, bound to its image and patient.

    magic   version  data key id  nonce     ciphertext and tag
    "DERM"  1        16 bytes     12 bytes  the rest

AES-256-GCM under a key of the image's own. Magic, version, image, patient, content type
and data key id are authenticated with it (AAD), so that no sealed image can stand in for
another one, or be read as another patient's or as another type.
"""

from __future__ import annotations

from dataclasses import dataclass
import os
import struct
from threading import Lock
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from serve_app.domain.errors import IntegrityError

_PREFIX = b"DERM\x01"
_HEADER = struct.Struct("5s16s12s")
#: At the end of a sealed image: GCM's tag.
TAG_BYTES = 16


@dataclass(frozen=True, slots=True)
class ImageBinding:
    """What a sealed image is sealed to; opening it needs the very same."""

    image_id: UUID
    patient_id: str
    content_type: str

    def associated_data(self, data_key_id: UUID) -> bytes:
        """Return the AAD: each field behind its length (4 bytes), so that none can pass for two."""
        fields = (
            self.image_id.bytes,
            self.patient_id.encode("utf-8", "surrogatepass"),
            self.content_type.encode("utf-8", "surrogatepass"),
            data_key_id.bytes,
        )
        return _PREFIX + b"".join(len(field).to_bytes(4, "big") + field for field in fields)


class DataKey:
    """The key of one image: seals once, opens as often as needed; its bytes cannot be read from it.

    A key read back from the key store is `spent`: it opens, and never seals again. Neither
    cipher nor lock can be pickled, so that it never leaves its process.
    """

    __slots__ = ("_cipher", "_unused", "id")

    def __init__(self, data_key_id: UUID, material: bytes, *, spent: bool) -> None:
        self.id = data_key_id
        self._cipher = AESGCM(material)
        self._unused = Lock()  # taken by the one seal, and never given back
        if spent:
            self._unused.acquire()

    def __repr__(self) -> str:
        return f"DataKey({self.id})"

    def encrypt(self, nonce: bytes, plaintext: bytes, associated_data: bytes) -> bytes:
        """Encrypt this key's one plaintext; IntegrityError for a second."""
        if not self._unused.acquire(blocking=False):
            raise IntegrityError(f"Data key {self.id} has sealed its image; it seals no other")
        return self._cipher.encrypt(nonce, plaintext, associated_data)

    def decrypt(self, nonce: bytes, ciphertext: bytes, associated_data: bytes) -> bytes:
        """Decrypt; IntegrityError when anything differs from what was encrypted."""
        try:
            return self._cipher.decrypt(nonce, ciphertext, associated_data)
        except InvalidTag as error:
            raise IntegrityError from error


def seal(plaintext: bytes, *, data_key: DataKey, binding: ImageBinding) -> bytes:
    """Seal an image under a fresh data key: 49 bytes longer than the plaintext.

    IntegrityError when the key has sealed before.
    """
    nonce = os.urandom(12)
    ciphertext = data_key.encrypt(nonce, plaintext, binding.associated_data(data_key.id))
    return _HEADER.pack(_PREFIX, data_key.id.bytes, nonce) + ciphertext


def open_sealed(sealed: bytes, *, data_key: DataKey, binding: ImageBinding) -> bytes:
    """Open a sealed image; IntegrityError when frame, key or binding is not the one it was sealed with."""
    data_key_id, nonce = _header_of(sealed)
    if data_key_id != data_key.id:
        raise IntegrityError("The image was sealed under another data key")
    return data_key.decrypt(nonce, sealed[_HEADER.size :], binding.associated_data(data_key_id))


def data_key_id_of(sealed: bytes) -> UUID:
    """Say which data key opens this image; IntegrityError when it is no sealed image."""
    return _header_of(sealed)[0]


def _header_of(sealed: bytes) -> tuple[UUID, bytes]:
    if len(sealed) < _HEADER.size + TAG_BYTES:
        raise IntegrityError("The sealed image is cut short")
    prefix, data_key_id, nonce = _HEADER.unpack_from(sealed)
    if prefix != _PREFIX:
        raise IntegrityError("Not a sealed image of a version this service knows")
    return UUID(bytes=data_key_id), nonce

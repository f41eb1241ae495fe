"""Receipts of erasure: proof that an image was destroyed, with nothing in it that says whose it was."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
import json
from uuid import UUID

from serve_app.domain.assessment import format_time

_DOMAIN = "derm-cds erasure receipt 1"


class ErasureReason(StrEnum):
    """Why an image is destroyed; a caller may give any but the last one."""

    PATIENT_REQUEST = "patient_request"
    CONSENT_WITHDRAWN = "consent_withdrawn"
    WRONG_PATIENT = "wrong_patient"
    UPLOADED_IN_ERROR = "uploaded_in_error"
    RETENTION = "retention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was destroyed, when, by whom and why; times are aware, the digest has 32 bytes.

    `ciphertext_sha256` names the ciphertext that went, so that a copy in a backup can be told to be the
    very same, and `data_key_id` the key without which that copy does not open.
    """

    receipt_id: UUID
    image_id: UUID
    erased_at: datetime
    actor: str
    reason: ErasureReason
    ciphertext_sha256: bytes
    data_key_id: UUID

    @property
    def record_hash(self) -> bytes:
        """SHA-256 of the fields as a JSON array, UTF-8 without spaces: anyone with the receipt can make it again."""
        fields = [
            _DOMAIN,
            str(self.receipt_id),
            str(self.image_id),
            format_time(self.erased_at, "microseconds"),
            self.actor,
            self.reason.value,
            self.ciphertext_sha256.hex(),
            str(self.data_key_id),
        ]
        return sha256(json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()).digest()

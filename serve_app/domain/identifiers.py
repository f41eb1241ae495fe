"""Identifiers of records."""

from __future__ import annotations

import re
import secrets
import time
from uuid import UUID

from serve_app.domain.errors import InvalidField

# Ids of the PMS: no spaces, so neither a name nor a date in words.
_PMS_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")

# Short and without spaces: it is written back into a header.
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")

_FHIR_ID = re.compile(r"[A-Za-z0-9.-]{1,64}")
_FHIR_USERS = frozenset({"Practitioner", "PractitionerRole", "Patient", "RelatedPerson"})

_OPAQUE = re.compile(
    r"(?i:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"  # UUID
    r"|(?i:[0-9a-f]{32})"  # UUID without hyphens, W3C trace id
    r"|[0-7][0-9A-HJKMNP-TV-Z]{25}"  # ULID
)


def new_id() -> UUID:
    """A UUIDv7 (RFC 9562, 5.7): unguessable, and in the order of creation to the millisecond."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & (1 << 48) - 1) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return UUID(int=value)


def parse_opaque_id(name: str, value: str) -> str:
    """Check an identifier of the PMS; raise InvalidField unless it is opaque."""
    if not _PMS_ID.fullmatch(value):
        raise InvalidField(f"{name}: an opaque id of up to 64 letters, digits and . _ : - is required.")
    return value


def is_fhir_id(text: str) -> bool:
    """Whether a text is an id of FHIR R4, by which another system knows a patient, say."""
    return _FHIR_ID.fullmatch(text) is not None


def is_fhir_user(text: str) -> bool:
    """Whether a text is how CDS Hooks names a user: the type of a FHIR resource and its id."""
    kind, _, fhir_id = text.partition("/")
    return kind in _FHIR_USERS and is_fhir_id(fhir_id)


def is_plain(text: str) -> bool:
    """Whether an identifier that a caller made up may be answered with."""
    return _PLAIN.fullmatch(text) is not None


def is_opaque(text: str) -> bool:
    """Whether an identifier that somebody else made up has a form that names nobody: a UUID, trace id or ULID."""
    return _OPAQUE.fullmatch(text) is not None

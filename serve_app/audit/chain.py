"""The chain over the audit log: the form of an event that is hashed, and whether each seal follows from the one before.

Everything here is computed from the columns as they were read, so that a log is judged by no function of the database
that holds it, and an exported one without any database.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
import json
from operator import attrgetter
from pathlib import Path
import re
from struct import Struct
from types import MappingProxyType
from typing import Any, NamedTuple

from serve_app.audit.checkpoints import Checkpoint, Seal
from serve_app.domain.errors import IntegrityError

#: What is before the first seal.
GENESIS = bytes(32)

_BEGINNING = Seal(0, GENESIS)
_POSITION = attrgetter("position")
#: PostgreSQL counts from 2000-01-01, microseconds; the form counts from 1970.
_EPOCH_US = 946_684_800_000_000
_SIZE, _COUNT = Struct("!i").unpack_from, Struct("!h").unpack_from
#: A binary COPY begins with so many bytes of signature and flags, and then the length of what else is in its header.
_HEADER = 15

_quoted = json.JSONEncoder(ensure_ascii=False).encode


class SealedEvent(NamedTuple):
    """A seal as it is stored, and the form of its event as that is now; `text` None where it is gone."""

    position: int
    event_id: int
    hash: bytes
    text: bytes | None


@dataclass(frozen=True, slots=True)
class Tampering:
    """Something that was done to the log: what, at which seal (0: none of them) and event, or to what else."""

    kind: str
    position: int = 0
    event_id: int | None = None
    about: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """The chain's head as it was checked, and what was found; no finding is as it should be."""

    head: Seal
    findings: tuple[Tampering, ...]


def _number(value: bytes) -> int:
    return int.from_bytes(value, signed=True)


def _integer(value: bytes) -> str:
    return str(_number(value))


def _instant(value: bytes) -> str:
    at = _number(value) + _EPOCH_US
    return f"{'-' if at < 0 else ''}{abs(at) // 1_000_000}.{abs(at) % 1_000_000:06}"


def _text(value: bytes) -> str:
    return _quoted(value.decode())


def _uuid(value: bytes) -> str:
    digits = value.hex()
    return f'"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"'


def _json(value: bytes) -> str:
    return value[1:].decode()  # behind the version of jsonb's format, as PostgreSQL writes it


#: The columns of an event in the order of its form, and how each is written there.
_COLUMNS: Mapping[str, Callable[[bytes], str]] = MappingProxyType(
    {
        "event_id": _integer,
        "recorded_at": _instant,
        "action": _text,
        "actor": _text,
        "outcome": _text,
        "patient_id": _text,
        "lesion_id": _uuid,
        "image_id": _uuid,
        "assessment_id": _uuid,
        "request_id": _text,
        "detail": _json,
    }
)
#: In front of them in every row that is read: position, event id and hash of the seal.
_FIELDS: tuple[Callable[[bytes], Any], ...] = (_number, _number, bytes, *_COLUMNS.values())


def read_events(copied: bytes) -> list[SealedEvent]:
    """Read a binary COPY (PostgreSQL's documentation of COPY, "Binary Format") of seals with their events' columns.

    The form of an event, for ever, is its columns in order as a JSON array, spaced as PostgreSQL writes jsonb; the time
    in seconds since 1970 with six decimals. Fields that are added to audit_events later need a form of their own.
    """
    at = _HEADER + 4 + _SIZE(copied, _HEADER)[0]
    events = []
    while _COUNT(copied, at)[0] >= 0:
        at += 2
        values: list[Any] = []
        for read in _FIELDS:
            size = _SIZE(copied, at)[0]
            at += 4
            if size < 0:
                values.append(None)
            else:
                values.append(read(copied[at : at + size]))
                at += size
        position, event_id, seal, *columns = values
        text = f"[{', '.join(['null' if value is None else value for value in columns])}]".encode()
        events.append(
            SealedEvent(position or 0, event_id or 0, seal or b"", None if columns[0] is None else text)
        )
    return events


def link(before: bytes, position: int, text: bytes) -> bytes:
    """The hash of a seal."""
    return sha256(before + position.to_bytes(8, "big") + sha256(text).digest()).digest()


async def follow(
    batches: AsyncIterable[Sequence[SealedEvent]],
    known: Sequence[Seal],
    *,
    since: Seal = _BEGINNING,
    stored: bytes | None = GENESIS,
) -> Verification:
    """Recompute the chain from `since`, and hold it against seals that are `known` from elsewhere.

    Finds events edited, removed, moved or exchanged, a chain cut short or written anew behind a known seal, and known
    seals that contradict each other. `batches` are all sealed events after `since`, in order; `stored` is the hash
    that the log itself has there, None for none.
    """
    expected, findings = _agree(known)
    # From what is stored there: that it is not what is known is one finding, and what follows may be sound.
    position, at = since.position, stored or since.hash
    if stored != since.hash:
        kind = "the chain was written anew" if stored else "the log was cut short"
        findings.append(Tampering(kind, position))
    expected = {place: value for place, value in expected.items() if place > position}
    async for batch in batches:
        for sealed in batch:
            where = sealed.position, sealed.event_id
            if sealed.position != position + 1:
                findings.append(Tampering("seals are missing", *where))
            if sealed.text is None:
                findings.append(Tampering("the event is gone", *where))
            elif sealed.position < 0 or link(at, sealed.position, sealed.text) != sealed.hash:
                findings.append(Tampering("the event or its place has changed", *where))
            if expected.pop(sealed.position, sealed.hash) != sealed.hash:
                findings.append(Tampering("the chain was written anew", *where))
            # From the stored hash on: one change is one finding.
            position, at = sealed.position, sealed.hash
    findings += [Tampering("the log was cut short", place) for place in sorted(expected)]
    return Verification(Seal(position, at), tuple(findings))


def _agree(known: Sequence[Seal]) -> tuple[dict[int, bytes], list[Tampering]]:
    """The hash that is known of each position, and the positions of which two are: one of them was forged.

    Were the later one believed, it would hide what was done since the earlier one.
    """
    hashes = {
        position: {seal.hash for seal in seals}
        for position, seals in groupby(sorted(known, key=_POSITION), key=_POSITION)
    }
    contradictions = [
        Tampering("two checkpoints contradict each other", position)
        for position, values in hashes.items()
        if len(values) > 1
    ]
    return {position: min(values) for position, values in hashes.items() if len(values) == 1}, contradictions


def newest(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one of the highest position; None without any."""
    return max(checkpoints, key=_POSITION, default=None)


def describe(finding: Tampering) -> str:
    """Say a finding in words: what, and where."""
    at = finding.about or (f"seal {finding.position}" if finding.position else "no seal")
    return f"{finding.kind}: {at}{'' if finding.event_id is None else f', event {finding.event_id}'}"


_LINE = re.compile(
    rb'\{"position": ([1-9]\d{0,17}), "hash": "([0-9a-f]{64})", "event_id": (-?\d+), "event": (null|\[.*\])\}\n'
)


def export_line(sealed: SealedEvent) -> bytes:
    """Write a sealed event as one line of JSON, its event in the very form that is hashed."""
    return b'{"position": %d, "hash": "%s", "event_id": %d, "event": %s}\n' % (
        sealed.position,
        sealed.hash.hex().encode(),
        sealed.event_id,
        sealed.text or b"null",
    )


async def exported_events(file: Path) -> AsyncIterable[list[SealedEvent]]:
    """Read what `export_line` wrote; IntegrityError names the first line that it did not."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if (found := _LINE.fullmatch(line)) is None:
                raise IntegrityError(f"{file}, line {number}, is not of an export of the sealed log.")
            text = None if found[4] == b"null" else found[4]
            yield [SealedEvent(int(found[1]), int(found[3]), bytes.fromhex(found[2].decode()), text)]

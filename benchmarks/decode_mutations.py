"""Images to start from, and what is done to their bytes: for benchmarks.decode_fuzz."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import io
from pathlib import Path
from random import Random
import struct
from typing import Any
import zlib

from PIL import Image

#: A seed larger than this would take the time of a hundred others.
_MAX_SEED_BYTES = 60_000
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def draw_seeds() -> Iterator[bytes]:
    """Draw small JPEG and PNG files of every kind that the decoder knows: modes, depths, scans, metadata."""
    base = Image.radial_gradient("L").resize((72, 56))
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x010E: "a description", 0x9003: "2026:01:01 10:00:00", 0x927C: b"\0" * 64})
    metadata: dict[str, Any] = {"exif": exif, "icc_profile": b"\0" * 256}
    jpeg: list[tuple[str, dict[str, Any]]] = [
        ("RGB", {"quality": 90}),
        ("RGB", {"progressive": True, "subsampling": 2}),
        ("RGB", {"restart_marker_blocks": 2, "optimize": True}),
        ("RGB", {**metadata, "comment": b"a comment"}),
        ("L", {"progressive": True}),
        ("CMYK", {"quality": 70, **metadata}),
    ]
    png: list[tuple[str, dict[str, Any]]] = [
        ("RGB", metadata),
        ("RGBA", {"compress_level": 1}),
        ("LA", {}),
        ("L", {"transparency": 7}),
        ("P", {"transparency": 3}),
        ("P", {"transparency": bytes(range(200)), "bits": 8}),
        ("1", {}),
        ("I;16", {}),
    ]
    for kind, shapes in (("JPEG", jpeg), ("PNG", png)):
        for mode, options in shapes:
            buffer = io.BytesIO()
            pixels = base.convert("I").convert("I;16") if mode == "I;16" else base.convert(mode)
            pixels.save(buffer, kind, **options)
            yield buffer.getvalue()
    buffer = io.BytesIO()
    base.convert("RGB").save(buffer, "PNG", save_all=True, append_images=[base.convert("RGB").rotate(9)])
    yield buffer.getvalue()


def read_seeds(folder: Path) -> list[bytes]:
    """Read the corpus's small files that have a JPEG's or PNG's magic bytes, in the order of their names."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size <= _MAX_SEED_BYTES:
            data = path.read_bytes()
            if data.startswith((_JPEG, _PNG)):
                found.append(data)
    return found


def mutate(data: bytes, other: bytes, dice: Random) -> tuple[bytes, str]:
    """Change an image in one way or two; the first change is named. The magic bytes mostly stay."""
    name = dice.choice(list(_CHANGES))
    changed = _CHANGES[name](data, other, dice)
    if dice.random() < 0.3:
        changed = _flip_bits(changed, other, dice)
    return changed, name


def _place(data: bytes, dice: Random) -> int:
    # Headers and tables come first, and decide most.
    end = min(len(data), 600) if dice.random() < 0.5 else len(data)
    return dice.randrange(min(3, end), max(end, 4))


def _flip_bits(data: bytes, _other: bytes, dice: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.randint(1, 12)):
        place = _place(data, dice)
        if place < len(changed):
            changed[place] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _set_bytes(data: bytes, _other: bytes, dice: Random) -> bytes:
    place = _place(data, dice)
    value = dice.choice([b"\xff", b"\0", b"\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", dice.randbytes(8)])
    return data[:place] + value + data[place + len(value) :]


def _truncate(data: bytes, _other: bytes, dice: Random) -> bytes:
    return data[: _place(data, dice)]


def _splice(data: bytes, other: bytes, dice: Random) -> bytes:
    return data[: _place(data, dice)] + other[_place(other, dice) :]


def _repeat(data: bytes, _other: bytes, dice: Random) -> bytes:
    start, end = sorted((_place(data, dice), _place(data, dice)))
    return data[:end] + data[start:end] * dice.choice([1, 2, 20]) + data[end:]


def _cut_out(data: bytes, _other: bytes, dice: Random) -> bytes:
    start, end = sorted((_place(data, dice), _place(data, dice)))
    return data[:start] + data[end:]


def _parts(data: bytes) -> list[tuple[int, int]]:
    """Where a PNG's chunks, or a JPEG's segments up to the first scan, begin and end."""
    parts, position = [], 8 if data.startswith(_PNG) else 2
    while position + 12 <= len(data):
        if data.startswith(_PNG):
            end = position + 12 + int.from_bytes(data[position : position + 4])
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if end > len(data):
            break
        parts.append((position, end))
        if data[position : position + 2] == b"\xff\xda":
            break
        position = end
    return parts


def _change_length(data: bytes, other: bytes, dice: Random) -> bytes:
    parts = _parts(data)
    if not parts:
        return _set_bytes(data, other, dice)
    start, end = dice.choice(parts)
    wide = data.startswith(_PNG)
    length = end - start - (12 if wide else 2)
    limit = 2**32 if wide else 2**16
    value = dice.choice([0, 1, length - 1, length + 1, 2 * length, limit // 2, limit - 1]) % limit
    at = start if wide else start + 2
    packed = struct.pack(">I" if wide else ">H", value)
    return data[:at] + packed + data[at + len(packed) :]


def _double_part(data: bytes, other: bytes, dice: Random) -> bytes:
    parts = _parts(data)
    if not parts:
        return _repeat(data, other, dice)
    start, end = dice.choice(parts)
    at = dice.choice(parts)[1]
    return data[:at] + data[start:end] * dice.choice([1, 3, 40]) + data[at:]


def _reseal(data: bytes, other: bytes, dice: Random) -> bytes:
    """Change a PNG chunk's body and make its checksum right again, so that the change gets through."""
    chunks = [part for part in _parts(data) if part[1] - part[0] > 12]
    if not data.startswith(_PNG) or not chunks:
        return _flip_bits(data, other, dice)
    start, end = dice.choice(chunks)
    body = bytearray(data[start + 4 : end - 4])
    for _ in range(dice.randint(1, 4)):
        body[dice.randrange(4, len(body))] = dice.randrange(256)
    return data[: start + 4] + bytes(body) + struct.pack(">I", zlib.crc32(body)) + data[end:]


_CHANGES: dict[str, Callable[[bytes, bytes, Random], bytes]] = {
    "flip bits": _flip_bits,
    "set bytes": _set_bytes,
    "truncate": _truncate,
    "splice": _splice,
    "repeat": _repeat,
    "cut out": _cut_out,
    "change length": _change_length,
    "double part": _double_part,
    "reseal": _reseal,
}

"""How much work a file's structure makes, counted before a decoder does it.

Pillow reads JPEG markers and PNG chunks one by one in Python, and libjpeg goes over the whole
picture once a scan. 20 MB of the smallest possible ones would keep a core busy for 10 s and
15 minutes; no camera writes more than a few dozen.
"""

from __future__ import annotations

from dataclasses import dataclass
import re
import zlib

from serve_app.domain.errors import UndecodableImage

#: JPEG: metadata of 20 MB is 320 segments of 64 KB; libjpeg's own progressive scripts have 10 scans.
MAX_SEGMENTS = 2_000
MAX_SCANS = 64
#: Bytes between segments that belong to none.
MAX_JUNK = 65_536
#: PNG: 20 MB in libpng's customary chunks of 8 KB is 2,560.
MAX_CHUNKS = 10_000
#: Bytes of an ICC profile; larger ones are ignored. A press's tables of colours take 3 MB, a camera's profile 3 KB.
MAX_PROFILE = 4_000_000

_SCAN, _END = 0xDA, 0xD9
#: Application data and comments: nothing of the picture.
_METADATA = frozenset({*range(0xE0, 0xF0), 0xFE})
#: Starts of frames: ITU-T T.81, table B.1 without the codes that mean something else, and T.87 (JPEG-LS).
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC})
#: Within a scan, 0xFF is data when a zero follows, and restart markers belong to it.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
#: Ancillary chunks of a PNG that change what is seen; text, times and animation do not.
_SEEN = frozenset({b"tRNS", b"eXIf"})


@dataclass(frozen=True, slots=True)
class JpegStructure:
    """A JPEG's segments before its first scan, without metadata (marker included), and its scans' headers.

    Whether they make a picture is left to the decoder.
    """

    tables: tuple[bytes, ...]
    scans: tuple[bytes, ...]
    first_scan: int

    @property
    def frame(self) -> bytes:
        """The body of the start of frame, behind its marker and length; empty where there is none."""
        return self._start_of_frame[4:]

    @property
    def process(self) -> int:
        """The marker of the start of frame, which says how the picture is coded; 0 where there is none."""
        return self._start_of_frame[1] if self._start_of_frame else 0

    @property
    def _start_of_frame(self) -> bytes:
        return next((table for table in reversed(self.tables) if table[1] in _FRAMES), b"")


def read_jpeg_structure(data: bytes) -> JpegStructure:
    """Walk a JPEG's markers. Raises UndecodableImage for more parts than any camera writes."""
    tables, first = _segments(data)
    return JpegStructure(tables, _scans(data, first), first)


def _segments(data: bytes) -> tuple[tuple[bytes, ...], int]:
    """Walk the markers as Pillow does; the segments, and where the first scan begins or the data end."""
    position, segments, junk = 2, 0, 0
    tables: list[bytes] = []
    while (marker := data.find(b"\xff", position)) >= 0 and marker + 1 < len(data):
        junk += marker - position
        code = data[marker + 1]
        if code == _SCAN:
            break
        if code in {0x00, 0xFF}:
            junk += 1
            position = marker + 1 + (code == 0x00)
        else:
            segments += 1
            position = _after(data, marker)
            if code not in _METADATA:
                tables.append(data[marker:position])
        if segments > MAX_SEGMENTS or junk > MAX_JUNK:
            raise UndecodableImage
    else:
        marker = len(data)
        junk += max(0, marker - position)
    if junk > MAX_JUNK:
        raise UndecodableImage
    return tuple(tables), marker


def _scans(data: bytes, first: int) -> tuple[bytes, ...]:
    """Find the scans up to the end of the image; what a camera appends behind it is its own affair."""
    scans: list[bytes] = []
    parts, position = 0, first
    while (found := _NEXT_MARKER.search(data, position)) and data[found.start() + 1] != _END:
        position = _after(data, found.start())
        if data[found.start() + 1] == _SCAN:
            scans.append(data[found.start() + 4 : position])
        parts += 1
        if len(scans) > MAX_SCANS or parts > MAX_SEGMENTS:
            raise UndecodableImage
    return tuple(scans)


def _after(data: bytes, marker: int) -> int:
    code = data[marker + 1]
    alone = 0xD0 <= code <= _END or code == 0x01
    return marker + 2 if alone else marker + 2 + max(2, int.from_bytes(data[marker + 2 : marker + 4]))


def read_png_structure(data: bytes) -> tuple[bytes, bytes | None]:
    """The chunks of a PNG that are seen, and its ICC profile unpacked.

    Text is left out: Pillow refuses a whole picture for a comment over 1 MB, and for a profile as large.
    Raises UndecodableImage for more chunks than any program writes.
    """
    kept, profile = [data[:8]], None
    position, chunks = 8, 0
    while position < len(data):
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise UndecodableImage
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        if kind == b"iCCP":
            profile = _unpacked_profile(data[position + 8 : end - 4])
        elif kind in _SEEN or not kind[:1].islower():
            kept.append(data[position:end])
        position = end
    return b"".join(kept), profile


def _unpacked_profile(chunk: bytes) -> bytes | None:
    """Unpack the profile of an iCCP chunk: a name, a zero, the method, a zlib stream; None where it is none."""
    _, _, packed = chunk.partition(b"\0")
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], MAX_PROFILE + 1)
    except zlib.error:
        return None
    return profile if unpacker.eof and len(profile) <= MAX_PROFILE else None

"""How much work a file's structure makes, counted before a decoder does it.

Pillow reads JPEG markers and PNG chunks one by one in Python, and libjpeg goes over the whole
picture once a scan. 20 MB of the smallest possible ones would keep a core busy for 10 s and
15 minutes; no camera writes more than a few dozen.
"""

from __future__ import annotations

import re

from serve_app.domain.errors import UndecodableImage

#: JPEG: metadata of 20 MB is 320 segments of 64 KB; libjpeg's own progressive scripts have 10 scans.
MAX_SEGMENTS = 2_000
MAX_SCANS = 64
#: Bytes between segments that belong to none.
MAX_JUNK = 65_536
#: PNG: 20 MB in libpng's customary chunks of 8 KB is 2,560.
MAX_CHUNKS = 10_000

_SCAN, _END = 0xDA, 0xD9
#: Within a scan, 0xFF is data when a zero follows, and restart markers belong to it.
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


def bound_structure(data: bytes) -> None:
    """Raise UndecodableImage for a JPEG or PNG with more parts than any camera writes.

    Whether the parts make a picture is left to the decoder.
    """
    if data.startswith(b"\xff\xd8"):
        _bound_scans(data, _bound_segments(data))
    else:
        _bound_chunks(data)


def _bound_segments(data: bytes) -> int:
    """Walk the markers as Pillow does; where the first scan begins, or the end of the data."""
    position, segments, junk = 2, 0, 0
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
        if segments > MAX_SEGMENTS or junk > MAX_JUNK:
            raise UndecodableImage
    else:
        marker = len(data)
        junk += max(0, marker - position)
    if junk > MAX_JUNK:
        raise UndecodableImage
    return marker


def _bound_scans(data: bytes, first: int) -> None:
    """Count the scans up to the end of the image; what a camera appends behind it is its own affair."""
    scans, parts, position = 0, 0, first
    while (found := _NEXT_MARKER.search(data, position)) and data[found.start() + 1] != _END:
        scans += data[found.start() + 1] == _SCAN
        parts += 1
        if scans > MAX_SCANS or parts > MAX_SEGMENTS:
            raise UndecodableImage
        position = _after(data, found.start())


def _after(data: bytes, marker: int) -> int:
    code = data[marker + 1]
    alone = 0xD0 <= code <= _END or code == 0x01
    return marker + 2 if alone else marker + 2 + max(2, int.from_bytes(data[marker + 2 : marker + 4]))


def _bound_chunks(data: bytes) -> None:
    position, chunks = 8, 0
    while position < len(data):
        chunks += 1
        if chunks > MAX_CHUNKS:
            raise UndecodableImage
        position += 12 + int.from_bytes(data[position : position + 4])

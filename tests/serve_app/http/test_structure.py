"""Files of few bytes' meaning and many parts: rejected before a decoder spends minutes on them."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib

from PIL import Image
import pytest


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def many_scans() -> bytes:
    """100,000 scans of a 40-megapixel picture: 15 minutes of libjpeg's time in 8 MB."""
    buffer = io.BytesIO()
    Image.new("RGB", (6300, 6300), (200, 150, 140)).save(buffer, "JPEG", progressive=True, quality=50)
    image = buffer.getvalue()
    scan = image.rindex(b"\xff\xda")
    tables, end = image.rindex(b"\xff\xc4", 0, scan), image.index(b"\xff\xd9", scan)
    return image[:end] + image[tables:end] * 100_000 + image[end:]


CRAFTED = {
    "junk": lambda: b"\xff\xd8\xff" + bytes(15_000_000),
    "fill bytes": lambda: b"\xff\xd8" + b"\xff" * 15_000_000,
    "escapes": lambda: b"\xff\xd8" + b"\xff\x00" * 7_000_000,
    "comments": lambda: b"\xff\xd8" + b"\xff\xfe\x00\x02" * 3_750_000,
    "metadata": lambda: b"\xff\xd8" + b"\xff\xe1\x00\x02" * 3_750_000,
    "starts": lambda: b"\xff\xd8" + b"\xff\xd8" * 7_000_000,
    "scans": many_scans,
    "chunks": lambda: (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 300, 300, 8, 2, 0, 0, 0))
        + chunk(b"tEXt", b"a\0b") * 1_000_000
    ),
}


@pytest.mark.parametrize("make", CRAFTED.values(), ids=CRAFTED)
async def test_a_file_of_endless_parts_is_rejected_at_once(service, make) -> None:
    image = make()
    patient = await service.care()
    since = time.process_time()  # others may have the machine
    response = await service.upload(patient, image=image)
    took = time.process_time() - since
    service.hold_to_problem(response, 422, "undecodable_image")
    assert took < 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
async def test_what_a_camera_appends_or_describes_at_length_is_no_harm(
    service, drawn_lesion, options: dict[str, bool]
) -> None:
    """A moving picture behind the image, and 3 MB of metadata in front of it."""
    image = drawn_lesion(kind="JPEG", **options)
    segment = b"\xff\xe2" + struct.pack(">H", 65_535) + os.urandom(65_533)
    long = image[:2] + segment * 48 + image[2:] + os.urandom(3_000_000)
    response = await service.upload(await service.care(), image=long)
    assert response.status_code == 201, response.text

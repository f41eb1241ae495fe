"""Files that were made to break decoders, through the whole service."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
import io
import os
from pathlib import Path
import struct
import time
from typing import Any
import zlib

import httpx
from PIL import Image
import psutil
import pytest

from tests.serve_app.lesions.conftest import AlteredStages

_STATUSES = {201, 413, 415, 422}
_AT_ONCE = 4
#: Of the processor, for so many: others may have the machine.
_TOGETHER_S = 4.0
_GROWTH_BYTES = 400_000_000


#: Others' loops write events, too, of erasures that were begun before.
_EVENTS = "SELECT count(*) FROM audit_events WHERE action IN ('upload', 'classify')"


async def send_all(service, files: Sequence[Path]) -> AsyncIterator[tuple[Path, httpx.Response]]:
    """Send every file, and hold each answer and what is stored against the contract."""
    process, statuses = psutil.Process(), Counter[int]()
    patient = await service.care()
    assert (await service.upload(patient)).status_code == 201
    before, resident = await service.counts(), process.memory_info().rss
    events = await service.owner.fetchval(_EVENTS)

    async def send(path: Path) -> tuple[Path, httpx.Response]:
        image = await asyncio.to_thread(path.read_bytes)
        return path, await service.upload(patient, image=image, name=path.name)

    for start in range(0, len(files), _AT_ONCE):
        since = time.process_time()
        answers = await asyncio.gather(*map(send, files[start : start + _AT_ONCE]))
        assert time.process_time() - since < _TOGETHER_S, answers
        for path, response in answers:
            statuses[response.status_code] += 1
            assert response.status_code in _STATUSES, f"{path}: {response.text}"
            if response.status_code == 201:
                service.hold_to("AssessmentDocument", response.json())
            else:
                service.hold_to_problem(response, response.status_code, response.json()["code"])
            yield path, response
        assert process.memory_info().rss - resident < _GROWTH_BYTES
    after = await service.counts()
    for table in ("lesions", "lesion_images", "assessments"):
        assert after[table] - before[table] == statuses[201]
    assert await service.owner.fetchval(_EVENTS) - events == len(files) + statuses[201]


async def test_hostile_files_are_answered_or_rejected(start_service, local_stages, corpora_dir: Path) -> None:
    """Those that are too small for an answer are decoded as well, by a service that asks for no size."""
    files = sorted(path for path in (corpora_dir / "images").rglob("*") if path.is_file())
    assert len(files) > 1000
    async with start_service(local_stages(answer_all=False, threads=2)) as service:
        codes = {path: response.json().get("code") async for path, response in send_all(service, files)}
    small = [path for path, code in codes.items() if code == "image_too_small"]
    assert len(small) > 100
    first: list[Any] = []

    async def as_the_first(answer: Any) -> Any:
        """Classified as the first was: what is hostile has happened before."""
        if first:
            answer.close()
        else:
            first.append(await answer)
        return first[0]

    stages = AlteredStages(local_stages(min_side=1, answer_all=False, threads=2), "classify", as_the_first)
    async with start_service(stages) as service:
        answers = [response.json() async for _, response in send_all(service, small)]
    assert not any(answer.get("code") == "image_too_small" for answer in answers)


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
async def test_what_a_camera_appends_is_no_harm(service, drawn_lesion, options) -> None:
    """A moving picture behind the image, and 3 MB of metadata in front of it."""
    image = drawn_lesion(kind="JPEG", **options)
    segment = b"\xff\xe2" + struct.pack(">H", 65_535) + os.urandom(65_533)
    long = image[:2] + segment * 48 + image[2:] + os.urandom(3_000_000)
    response = await service.upload(await service.care(), image=long)
    assert response.status_code == 201, response.text

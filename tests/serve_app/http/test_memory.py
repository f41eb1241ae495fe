"""A patient's image never touches the disk unsealed, and what is under way is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import io
from pathlib import Path
import tempfile

import numpy as np
from PIL import Image
import pytest


def noise(side: int) -> bytes:
    """A PNG of three bytes a pixel: noise does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def large_image() -> bytes:
    """15 MB."""
    return noise(2300)


@pytest.fixture
def no_temporary_files(monkeypatch):
    """Fail every attempt to open a temporary file, and note it."""
    opened: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        opened.append("a temporary file was opened")
        raise OSError(opened[-1])

    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp", "mkdtemp", "_mkstemp_inner"):
        monkeypatch.setattr(tempfile, name, refuse)
    return opened


@pytest.mark.parametrize("sent", ["whole", "in pieces"])
async def test_a_large_upload_opens_no_temporary_file(
    service, large_image: bytes, no_temporary_files, sent: str
) -> None:
    assert 14e6 < len(large_image) < 20e6
    patient = await service.care()
    if sent == "whole":
        response = await service.upload(patient, image=large_image)
    else:
        head = (
            f'--b\r\nContent-Disposition: form-data; name="patient_id"\r\n\r\n{patient}\r\n'
            '--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        )
        body = head.encode() + large_image + b"\r\n--b--\r\n"

        async def pieces():
            for start in range(0, len(body), 65_536):
                yield body[start : start + 65_536]

        headers = {**service.token("dr"), "Content-Type": "multipart/form-data; boundary=b"}
        response = await service.client.post("/api/lesions", content=pieces(), headers=headers)
    assert response.status_code == 201, response.text
    assert no_temporary_files == []
    answer = response.json()
    original = await service.client.get(
        f"/api/lesions/{answer['lesion_id']}/images/{answer['image_id']}", headers=service.token("dr")
    )
    assert original.content == large_image


async def test_no_file_of_the_process_holds_an_upload_while_it_is_under_way(
    service, large_image: bytes
) -> None:
    """Look at every open file, unlinked ones too, while uploads come in and are assessed."""
    patient = await service.care()
    needle = large_image[100_000:100_064]
    uploads = asyncio.gather(*(service.upload(patient, image=large_image) for _ in range(2)))
    looked = 0
    while not uploads.done():
        for target, content in _open_files():
            assert needle not in content, target
            looked += 1
        await asyncio.sleep(0.02)
    assert [response.status_code for response in await uploads] == [201, 201]
    assert looked


def _open_files() -> Iterator[tuple[str, bytes]]:
    """The files this process has open, unlinked ones too, and what is in them."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            target = str(descriptor.readlink())
            if target.startswith("/") and not target.startswith(("/dev", "/proc")):
                with descriptor.open("rb") as file:
                    yield target, file.read(64_000_000)
        except OSError:
            continue


async def test_the_key_store_holds_no_image(service, settings) -> None:
    await service.upload(await service.care())
    needle = service.image[2000:2064]
    files = [path for path in settings.home.rglob("*") if path.is_file()]
    assert files
    assert not any(needle in path.read_bytes() for path in files)


async def test_above_the_gate_uploads_are_refused_and_nothing_is_stored(start_service, local_stages) -> None:
    async with start_service(local_stages(), max_uploads_in_flight=3) as service:
        patient = await service.care()
        before = await service.counts()
        responses = await asyncio.gather(*(service.upload(patient) for _ in range(30)))
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {201, 503}
        for response in responses:
            if response.status_code == 503:
                service.hold_to_problem(response, 503, "overloaded")
                assert int(response.headers["retry-after"]) > 0
        after = await service.counts()
        for table in ("lesions", "lesion_images", "assessments"):
            assert after[table] - before[table] == statuses.count(201)
        assert (await service.upload(patient)).status_code == 201

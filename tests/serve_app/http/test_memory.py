"""A patient's image never touches the disk unsealed, and what is under way is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
import io
from pathlib import Path
import sys
import tempfile
import threading
from typing import Any

import httpx
import numpy as np
from PIL import Image
import pytest

from tests.serve_app.erasure.erasing import path


@pytest.fixture(scope="module")
def large_image() -> bytes:
    """A PNG of 15.9 MB: noise does not compress."""
    pixels = np.random.default_rng(0).integers(0, 256, (2300, 2300, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def interpreter() -> tuple[threading.Event, list[str]]:
    """While the event is set: every file that is opened for writing, unnamed temporary ones too, as Python tells."""
    opened: list[str] = []
    watching = threading.Event()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching.is_set() and event == "open" and args[2] & 0o3:  # for writing
            opened.append(str(args[0]))
        if watching.is_set() and event.startswith("tempfile."):
            opened.append(event)

    sys.addaudithook(hook)
    return watching, opened


@pytest.mark.parametrize("sent", ["whole", "in pieces"])
async def test_a_large_upload_is_in_no_file(
    service, large_image: bytes, interpreter, tmp_path, monkeypatch, sent: str
) -> None:
    """What the interpreter opens is told by itself; what a library has open is looked at while it is assessed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert 14e6 < len(large_image) < 20e6
    patient = await service.care()
    upload = service.upload(patient, image=large_image)
    if sent == "in pieces":
        upload.close()
        upload = _send_in_pieces(service, patient, large_image)
    watching, opened = interpreter
    watching.set()
    running, looked = asyncio.create_task(upload), 0
    while not running.done():
        await asyncio.sleep(0.05)
        for target, content in _open_files():
            assert large_image[100_000:100_064] not in content, target
            looked += 1
    watching.clear()
    response = await running
    assert response.status_code == 201, response.text
    assert looked
    # The key store's lock, and what is renamed into place beside it
    assert [path for path in opened if not path.endswith((".json", ".partial", "/keys"))] == []
    assert list(tmp_path.iterdir()) == []
    answer = response.json()
    original = await service.get(path(answer))
    assert original.content == large_image


async def _send_in_pieces(service, patient: str, image: bytes) -> Any:
    form = httpx.Request(
        "POST", "http://derm", data={"patient_id": patient}, files={"image": ("a.png", image)}
    )
    body = form.read()

    async def pieces():
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    headers = {**service.token("dr"), "Content-Type": form.headers["content-type"]}
    return await service.client.post("/api/lesions", content=pieces(), headers=headers)


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
    files = [path for path in settings.home.rglob("*") if path.is_file()]
    assert files
    assert not any(service.image[2000:2064] in path.read_bytes() for path in files)


async def test_above_the_gate_uploads_are_refused_and_nothing_is_stored(start_service) -> None:
    async with start_service(max_uploads_in_flight=3) as service:
        patient = await service.care()
        before = await service.counts()
        responses = await asyncio.gather(*(service.upload(patient) for _ in range(12)))
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

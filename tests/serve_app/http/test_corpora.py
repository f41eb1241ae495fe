"""Files that were made to break decoders, through the whole service."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
import time
from typing import Any

import httpx
import psutil

_STATUSES = {201, 413, 415, 422}
_AT_ONCE = 4
#: Of the processor, for so many: others may have the machine.
_TOGETHER_S = 4.0
_GROWTH_BYTES = 400_000_000


class Remembering:
    """The real stages, but an image is classified as the first was: what is hostile has happened before."""

    def __init__(self, stages: Any) -> None:
        self._stages, self._first = stages, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stages, name)

    async def classify(self, *args: Any) -> Any:
        self._first = self._first or await self._stages.classify(*args)
        return self._first


async def send_all(service, files: Sequence[Path]) -> AsyncIterator[tuple[Path, httpx.Response]]:
    """Send every file, and hold each answer and what is stored against the contract."""
    process, statuses = psutil.Process(), Counter[int]()
    patient = await service.care()
    assert (await service.upload(patient)).status_code == 201
    before, resident = await service.counts(), process.memory_info().rss

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
    assert after["audit_events"] - before["audit_events"] == len(files) + statuses[201]


async def test_hostile_files_are_answered_or_rejected(start_service, local_stages, corpora_dir: Path) -> None:
    """Those that are too small for an answer are decoded as well, by a service that asks for no size."""
    files = sorted(path for path in (corpora_dir / "images").rglob("*") if path.is_file())
    assert len(files) > 1000
    async with start_service(local_stages(answer_all=False, threads=2)) as service:
        codes = {path: response.json().get("code") async for path, response in send_all(service, files)}
    small = [path for path, code in codes.items() if code == "image_too_small"]
    assert len(small) > 100
    async with start_service(Remembering(local_stages(min_side=1, answer_all=False, threads=2))) as service:
        answers = [response.json() async for _, response in send_all(service, small)]
    assert not any(answer.get("code") == "image_too_small" for answer in answers)

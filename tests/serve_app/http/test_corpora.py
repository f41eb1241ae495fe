"""Files that were made to break decoders, through the whole service."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
import time

import httpx
import psutil
import pytest

_STATUSES = {201, 413, 415, 422}
_EACH_S = 2.0
_AT_ONCE = 4
_GROWTH_BYTES = 400_000_000


@pytest.fixture(scope="module")
def files(corpora_dir: Path) -> list[tuple[Path, bytes]]:
    paths = sorted(path for path in (corpora_dir / "images").rglob("*") if path.is_file())
    return [(path, path.read_bytes()) for path in paths]


@pytest.mark.parametrize("min_side", [224, 1])
async def test_hostile_files_are_answered_or_rejected(
    start_service, local_stages, files: list[tuple[Path, bytes]], min_side: int, capsys
) -> None:
    assert len(files) > 1000
    statuses: Counter[int] = Counter()
    slowest = (0.0, "")
    process = psutil.Process()
    async with start_service(local_stages(min_side=min_side, answer_all=False, threads=2)) as service:
        patient = await service.care()
        assert (await service.upload(patient)).status_code == 201
        before, resident = await service.counts(), process.memory_info().rss
        peak = resident

        async def send(path: Path, image: bytes) -> tuple[Path, httpx.Response, float]:
            since = time.perf_counter()
            response = await service.upload(patient, image=image, name=path.name)
            return path, response, time.perf_counter() - since

        for start in range(0, len(files), _AT_ONCE):
            batch = await asyncio.gather(*(send(*file) for file in files[start : start + _AT_ONCE]))
            for path, response, took in batch:
                statuses[response.status_code] += 1
                slowest = max(slowest, (took, path.name))
                peak = max(peak, process.memory_info().rss)
                assert response.status_code in _STATUSES, f"{path}: {response.text}"
                assert took < _EACH_S, path
                if response.status_code == 201:
                    service.hold_to("AssessmentDocument", response.json())
                else:
                    service.hold_to_problem(response, response.status_code, response.json()["code"])
        after = await service.counts()
    stored = statuses[201]
    for table in ("lesions", "lesion_images", "assessments"):
        assert after[table] - before[table] == stored
    assert after["audit_events"] - before["audit_events"] == len(files) + stored
    assert peak - resident < _GROWTH_BYTES
    with capsys.disabled():
        print(
            f"\n{len(files)} hostile files, min side {min_side}: {dict(statuses)},"
            f" slowest {slowest[0]:.2f} s ({slowest[1]}), memory +{(peak - resident) / 1e6:.0f} MB"
        )

"""A load of uploads at one concurrency, and what came back."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
import os
from pathlib import Path
import statistics
import sys
from time import perf_counter
from typing import Any

import aiohttp

from serve_app.settings import REPOSITORY


def default_archive() -> Path:
    """Where the ISIC images are, unless an option says otherwise."""
    return Path(os.environ.get("DERM_ISIC_DIR", REPOSITORY.parent / "shared" / "isic"))


def images_in(folder: Path) -> list[Path]:
    """The JPEG files of a folder, in order; without any, one line on standard error and exit status 2."""
    images = sorted(folder.glob("*.jpg"))
    if not images:
        sys.stderr.write(f"There are no images (*.jpg) in {folder}: see --help, or set DERM_ISIC_DIR.\n")
        raise SystemExit(2)
    return images


@dataclass(frozen=True, slots=True)
class Upload:
    """A ready-made multipart body."""

    body: bytes
    content_type: str


@dataclass(slots=True)
class LoadResult:
    """Latencies in milliseconds, answers by status, stage timings as the service reported them."""

    concurrency: int
    seconds: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    stages_ms: dict[str, list[float]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """Percentiles, rate and non-2xx count."""
        ordered = sorted(self.latencies_ms)
        answered = len(ordered)

        def percentile(share: float) -> float:
            return round(ordered[min(answered - 1, int(share * answered))], 1)

        return {
            "concurrency": self.concurrency,
            "requests": answered,
            "requests_per_s": round(answered / self.seconds, 2),
            "p50_ms": percentile(0.50),
            "p95_ms": percentile(0.95),
            "p99_ms": percentile(0.99),
            "non_2xx": sum(n for status, n in self.statuses.items() if not 200 <= status < 300),
            "pending_202": self.statuses[202],
            "statuses": {str(status): n for status, n in sorted(self.statuses.items())},
            "stages_p50_ms": {
                stage: round(statistics.median(times), 1) for stage, times in sorted(self.stages_ms.items())
            },
        }


def make_upload(image: bytes, fields: dict[str, str]) -> Upload:
    """Build the multipart body once, so that the driver costs the machine as little as it can."""
    boundary = "derm-benchmark-boundary"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="lesion.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n".encode()
    )
    body = b"".join(parts) + image + f"\r\n--{boundary}--\r\n".encode()
    return Upload(body, f"multipart/form-data; boundary={boundary}")


async def drive(
    url: str, token: str, uploads: list[Upload], *, concurrency: int, seconds: float
) -> LoadResult:
    """Keep `concurrency` uploads under way for a while; every request started is waited for."""
    result = LoadResult(concurrency)
    turn = count()
    connector = aiohttp.TCPConnector(limit=concurrency)
    headers = {"Authorization": f"Bearer {token}"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        started = perf_counter()

        async def client() -> None:
            while perf_counter() - started < seconds:
                await _send(session, url, uploads[next(turn) % len(uploads)], result)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        result.seconds = perf_counter() - started
    return result


async def _send(session: aiohttp.ClientSession, url: str, upload: Upload, result: LoadResult) -> None:
    sent = perf_counter()
    headers = {"Content-Type": upload.content_type}
    async with session.post(url, data=upload.body, headers=headers) as response:
        answer = await response.json(content_type=None)
    result.latencies_ms.append((perf_counter() - sent) * 1000.0)
    result.statuses[response.status] += 1
    if response.status == 201:
        for stage, milliseconds in answer["timings_ms"].items():
            result.stages_ms.setdefault(stage, []).append(milliseconds)

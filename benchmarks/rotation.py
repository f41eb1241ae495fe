"""Rotating the key-encryption key under load: `python -m benchmarks.rotation --json`.

Five readers fetch sealed images from PostgreSQL and open them without pause, first undisturbed
(the baseline) and then while the key is rotated and every data key rewrapped. A read that fails,
or that opens to other bytes than were sealed, is a failure; there must be none.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from hashlib import sha256
import json
import os
from pathlib import Path
import platform
import random
import tempfile
from time import perf_counter
from typing import Any
from uuid import UUID, uuid4

from cluster.postgres import EmbeddedPostgres
from serve_app.domain.assessment import EVERY_REFERENCE
from serve_app.domain.errors import DermError
from serve_app.domain.patient import ClinicalContext
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.records.lesion_rows import Admission
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import NodeFiles

_READERS = 5
_BASELINE_S = 5.0
_IMAGE_BYTES = 20_000

#: lesion, image: SHA-256 of what was sealed.
_Images = dict[tuple[UUID, UUID], bytes]


class Readers:
    """Reads until told to stop; counts what was read and what failed, and how long each took."""

    def __init__(self, records: LesionStore, keys: KeyStore, images: _Images) -> None:
        self._records, self._keys, self._images = records, keys, images
        self._over = asyncio.Event()
        self.failures: list[str] = []
        self.taken_ms: list[float] = []

    async def during(self, work: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        """Read while `work` is done, and say how it went."""
        started = perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number in range(_READERS):
                tasks.create_task(self._read(random.Random(number)))
            try:
                await work()
            finally:
                self._over.set()
        seconds = perf_counter() - started
        taken = sorted(self.taken_ms)
        return {
            "seconds": round(seconds, 1),
            "reads": len(taken),
            "failed": len(self.failures),
            "reads_per_s": round(len(taken) / seconds),
            "p50_ms": round(taken[len(taken) // 2], 1),
            "p99_ms": round(taken[int(len(taken) * 0.99)], 1),
            "max_ms": round(taken[-1], 1),
            "failures": self.failures[:5],
        }

    async def _read(self, chance: random.Random) -> None:
        known = list(self._images)
        while not self._over.is_set():
            at, started = chance.choice(known), perf_counter()
            try:
                found = await self._records.sealed_image(*at)
                assert found is not None  # noqa: S101
                binding = ImageBinding(at[1], found.patient_id, found.content_type)
                image = await asyncio.to_thread(self._keys.open_image, found.sealed, binding)
                if sha256(image).digest() != self._images[at]:
                    self.failures.append("opened to other bytes")
            except DermError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self.taken_ms.append((perf_counter() - started) * 1000)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--images", type=int, default=5_000)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="derm-rotation-") as folder:
        home = Path(folder)
        home.chmod(0o711)
        postgres = EmbeddedPostgres(home)
        try:
            report = asyncio.run(_run(home, postgres, parsed.images))
        finally:
            postgres.stop()
    print(json.dumps(report, indent=2 if parsed.json else None))


async def _run(home: Path, postgres: EmbeddedPostgres, count: int) -> dict[str, Any]:
    urls, files = postgres.ensure(), NodeFiles(home)
    await migrate(urls.owner, application_role="derm_app")
    pool = await open_pool(urls.app, minimum=1, maximum=_READERS + 1, timeout_s=30)
    keyring = FileKeyring.make(files.keyring)
    # What `derm-cds keys` does in a process of its own: a second store on the same file.
    with (
        closing(KeyStore(files.keystore, keyring)) as operator,
        closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys,
    ):
        records = LesionStore(pool)
        try:
            images = await _seal_images(records, keys, count)
            before = await Readers(records, keys, images).during(lambda: asyncio.sleep(_BASELINE_S))
            meanwhile = await Readers(records, keys, images).during(
                lambda: asyncio.to_thread(_rotate_and_rewrap, keyring, operator)
            )
            versions = {str(each.key_version): each.data_keys for each in keys.count_versions()}
        finally:
            await pool.close()
    return {
        "benchmark": "rotation",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "images": count,
        "image_bytes": _IMAGE_BYTES,
        "readers": _READERS,
        "undisturbed": before,
        "rotate_and_rewrap": meanwhile,
        "data_keys_by_key_version": versions,
    }


def _rotate_and_rewrap(keyring: FileKeyring, store: KeyStore) -> None:
    keyring.rotate()
    while store.rewrap():
        pass


async def _seal_images(records: LesionStore, keys: KeyStore, count: int) -> _Images:
    images: _Images = {}
    for number in range(count):
        at, content = (uuid4(), uuid4()), os.urandom(_IMAGE_BYTES)
        binding = ImageBinding(at[1], f"patient-{number % 500}", "image/jpeg")
        data_key = await asyncio.to_thread(keys.create)
        admission = Admission(
            assessment_id=uuid4(),
            lesion_id=at[0],
            image_id=at[1],
            patient_id=binding.patient_id,
            encounter_id=None,
            new_lesion=True,
            created_at=datetime.now(UTC),
            sealed=seal(content, data_key=data_key, binding=binding),
            content_type=binding.content_type,
            width=600,
            height=450,
            context=ClinicalContext(),
            top_k=5,
            reference_filter=EVERY_REFERENCE,
            actor="benchmark",
            request_id="benchmark",
            idempotency_key=None,
            request_sha256=None,
        )
        await records.admit(admission)
        images[at] = sha256(content).digest()
    return images


if __name__ == "__main__":
    main()

"""A home with images in it, for what is backed up and restored."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from cluster.postgres import EmbeddedPostgres
from serve_app.domain.assessment import ReferenceFilter
from serve_app.domain.patient import ClinicalContext
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.records.lesion_rows import Admission
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, open_pool
from serve_app.settings import KeySettings, NodeFiles


@dataclass
class Clinic:
    """A home with images in it: which, and what each opens to."""

    home: Path
    images: dict[tuple[UUID, UUID], bytes] = field(default_factory=dict)

    @property
    def server(self) -> EmbeddedPostgres:
        return EmbeddedPostgres(self.home)

    def open_keys(self) -> KeyStore:
        files = NodeFiles(self.home)
        made = files.keystore.exists()
        return KeyStore(files.keystore, open_key_provider(KeySettings(home=self.home), first_start=not made))

    def ask(self, question: Callable[[Pool], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            pool = await open_pool(self.server.ensure().app, minimum=0, maximum=1, timeout_s=20)
            try:
                return await question(pool)
            finally:
                await pool.close()

        return asyncio.run(run())

    def add_images(self, count: int) -> None:
        with closing(self.open_keys()) as keys:
            self.ask(lambda pool: self._add_images(LesionStore(pool), keys, count))

    async def _add_images(self, records: LesionStore, keys: KeyStore, count: int) -> None:
        for number in range(count):
            lesion_id, image_id, content = uuid4(), uuid4(), b"image %d " % number + os.urandom(5000)
            binding = ImageBinding(image_id, f"patient-{number}", "image/jpeg")
            admission = Admission(
                assessment_id=uuid4(),
                lesion_id=lesion_id,
                image_id=image_id,
                patient_id=binding.patient_id,
                encounter_id=None,
                new_lesion=True,
                created_at=datetime.now(UTC),
                sealed=seal(content, data_key=keys.create(), binding=binding),
                content_type=binding.content_type,
                width=600,
                height=450,
                context=ClinicalContext(),
                top_k=5,
                reference_filter=ReferenceFilter(licences=("CC-0",)),
                actor="dr",
                request_id="r",
                idempotency_key=None,
                request_sha256=None,
            )
            assert await records.admit(admission) is None
            self.images[lesion_id, image_id] = content

    def sealed(self, at: tuple[UUID, UUID]) -> tuple[bytes, ImageBinding]:
        found = self.ask(lambda pool: LesionStore(pool).sealed_image(*at))
        return found.sealed, ImageBinding(at[1], found.patient_id, found.content_type)

    def opens(self, at: tuple[UUID, UUID]) -> bool:
        return self.open_image(at) == self.images[at]

    def open_image(self, at: tuple[UUID, UUID]) -> bytes:
        with closing(self.open_keys()) as keys:
            return keys.open_image(*self.sealed(at))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # it may be linked to
    path.write_bytes(content)

"""Confirmed reference cases, and the search for those most similar to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
import numpy as np
from numpy.typing import NDArray

from serve_app.domain.assessment import Neighbours, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.records.pool import Pool
from serve_app.records.sql import queries

#: Width of every embedding.
DIMENSIONS = 512

_SQL = queries("references")


@dataclass(frozen=True, slots=True)
class ReferenceImage:
    """A confirmed case as the ISIC archive describes it; `lesion_id` None where it does not know the lesion."""

    isic_id: str
    lesion_id: str | None
    diagnosis: Diagnosis
    diagnosis_confirm_type: str | None
    age_approx: int | None
    sex: str | None
    anatom_site_general: str | None
    copyright_license: str
    attribution: str


class ReferenceStore:
    """The references, by embedding space. RecordsUnavailable when the database does not answer in time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def nearest(
        self,
        embedding: NDArray[np.float32],
        *,
        embedding_space: str,
        k: int,
        licences: Sequence[str] = (),
        sites: Sequence[str] = (),
    ) -> Neighbours:
        """Find the K references of highest cosine, one a lesion, all of them when there are fewer.

        `embedding`: (512,). Exact, in one round trip; equals come in the order of their isic_id.
        `licences` and `sites` (anatom_site_general) limit everything found; empty means any.
        """
        rows = await self._pool.fetch(
            _SQL["nearest"], embedding, embedding_space, k, licences, sites, max(64, 4 * k)
        )
        similar = tuple(_case(row) for row in rows if row["role"] == "similar")
        alone = {row["role"]: _case(row) for row in rows if row["role"] != "similar"}
        malignant = sum(case.diagnosis in MALIGNANT for case in similar)
        return Neighbours(
            similar=similar,
            malignant_share=malignant / len(similar) if similar else None,
            nearest_benign=alone.get("nearest_benign"),
            nearest_malignant=alone.get("nearest_malignant"),
        )

    async def count(self, embedding_space: str) -> int:
        """Count the references of a space."""
        counted: int = await self._pool.fetchval(_SQL["count"], embedding_space)
        return counted

    async def load(
        self,
        images: Sequence[ReferenceImage],
        embeddings: NDArray[np.floating],
        *,
        embedding_space: str,
    ) -> None:
        """Add references or bring them up to date, all or nothing; needs the owner's role.

        `embeddings`: (len(images), 512), finite, unit norm. ValueError when they are not;
        Conflict when an image lacks what the archive must say (licence, attribution) or is UNK.
        """
        _check(images, embeddings)
        records = (
            (
                *(image.isic_id, image.lesion_id, image.diagnosis, image.diagnosis_confirm_type),
                *(image.age_approx, image.sex, image.anatom_site_general),
                *(image.copyright_license, image.attribution),
                *(image.diagnosis in MALIGNANT, embedding),
            )
            for image, embedding in zip(images, embeddings, strict=True)
        )
        async with self._pool.connection() as connection:
            async with connection.transaction():
                await connection.execute(_SQL["without_time_limits"])
                await connection.execute(_SQL["make_arrivals"], timeout=60)
                await connection.copy_records_to_table("arrivals", records=records, timeout=600)
                await connection.execute(_SQL["take_in_space"], embedding_space)
                for step in ("take_in_images", "take_in_copies"):
                    await connection.execute(_SQL[step], timeout=600)
                await connection.execute(_SQL["take_in_embeddings"], embedding_space, timeout=600)
            await connection.execute(_SQL["analyze"], timeout=60)


def _case(row: asyncpg.Record) -> SimilarCase:
    values = dict(row)
    del values["role"]
    return SimilarCase(**{**values, "diagnosis": Diagnosis(values["diagnosis"])})


def _check(images: Sequence[ReferenceImage], embeddings: NDArray[np.floating]) -> None:
    if embeddings.shape != (len(images), DIMENSIONS):
        raise ValueError(f"Embeddings of shape {embeddings.shape} for {len(images)} images")
    if not np.allclose(np.linalg.norm(embeddings.astype(np.float32), axis=1), 1, atol=1e-2):
        raise ValueError("Embeddings must be finite and of unit norm")

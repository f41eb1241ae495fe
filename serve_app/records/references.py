"""Confirmed reference cases, and the search for those most similar to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import asyncpg
import numpy as np
from numpy.typing import NDArray

from serve_app.audit.events import account_event
from serve_app.domain.assessment import EVERY_REFERENCE, Neighbours, ReferenceFilter, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, queries

#: Width of every embedding.
DIMENSIONS = 512
#: Fewer references of a kind (benign, malignant) have no index and are looked through one by one.
EXACT_BELOW = 4_000

_SQL = queries("references")
_BOTH_KINDS = (True, False)
# One step along an index takes as long as looking at so many references in a row (docs/references.md).
_STEP = 23
# Embeddings lie together by diagnosis: the images near a query may all be of another one than those asked for, and
# the index is walked for long to find few. So it takes a filter that leaves most of a kind to use it.
_MOST = 2 / 3
# How wide an index is walked (hnsw.ef_search): as chosen for 50,000 references, and wider in proportion beyond, to
# the most that pgvector takes.
_BREADTH, _BREADTH_PER_IMAGE, _MOST_BREADTH = 150, 1 / 256, 1_000
#: Copying, counting and indexing 400,000 references takes minutes.
LOAD_TIMEOUT_S = 1800


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

    @property
    def confirmed(self) -> bool:
        """Whether the archive says how the diagnosis was confirmed."""
        return bool(self.diagnosis_confirm_type)


def search_breadth(images: int) -> int:
    """How many candidates a search of an index of so many images keeps: pgvector's hnsw.ef_search."""
    return min(_MOST_BREADTH, max(_BREADTH, round(images * _BREADTH_PER_IMAGE)))


class ReferenceStore:
    """The references, by embedding space. RecordsUnavailable when the database does not answer in time."""

    def __init__(self, pool: Pool, *, exact_below: int = EXACT_BELOW) -> None:
        self._pool = pool
        self._exact_below = exact_below

    async def nearest(
        self,
        embedding: NDArray[np.float32],
        *,
        embedding_space: str,
        k: int,
        reference_filter: ReferenceFilter = EVERY_REFERENCE,
    ) -> Neighbours:
        """Find the K references of highest cosine, one a lesion, all of them when there are fewer.

        `embedding`: (512,). Equals come in the order of their isic_id. Exact, except that a kind (benign,
        malignant) of which many pass the filter is found by an index: that may pass over some, though
        never so that fewer than K are left. The filter limits everything found: under one of benign
        diagnoses there is no nearest malignant.
        """
        first = max(64, 4 * k)
        limits = astuple(reference_filter)
        asked = (embedding, embedding_space, k, *limits, first)
        async with self._pool.connection() as connection:
            counted = await connection.fetch(_SQL["count_kinds"], embedding_space, *limits)
            indexed = {
                row["malignant"]
                for row in counted
                if row["passing"] >= max(self._exact_below, _MOST * row["alike"])
                # Of every images / passing steps along the index one leads to what is looked for.
                and row["passing"] ** 2 >= _STEP * first * row["images"]
            }
            if not (indexed or reference_filter):
                return await _search(connection, asked, _BOTH_KINDS)
            async with connection.transaction(readonly=True):
                images = max((row["images"] for row in counted), default=0)
                await connection.execute(_SQL["plan_for_parameters"], search_breadth(images))
                found = await _search(
                    connection, asked, [kind for kind in _BOTH_KINDS if kind not in indexed]
                )
                nearest = {True: found.nearest_malignant, False: found.nearest_benign}
                if indexed and (len(found.similar) < k or None in map(nearest.get, indexed)):
                    found = await _search(connection, asked, _BOTH_KINDS)
                return found

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
        replace: bool = False,
    ) -> None:
        """Add references or bring them up to date, all or nothing, with the audit event; needs the owner's role.

        `replace`: nothing else stays in the space.
        `embeddings`: (len(images), 512), finite, unit norm. ValueError when they are not;
        Conflict when an image lacks what the archive must say (licence, attribution) or is UNK.
        A kind that grows large is indexed before any of it can be found. Loaders wait for each other.
        """
        async with self._pool.connection() as connection:
            async with connection.transaction():
                await wait_for_loaders(connection)
                await copy_arrivals(connection, images, embeddings)
                if replace:
                    await connection.execute(_SQL["leave_only_arrivals"], embedding_space)
                await take_in_arrivals(connection, embedding_space)
                await index_space(connection, embedding_space, exact_below=self._exact_below)
                detail = {"embedding_space": embedding_space, "references": len(images), "replaced": replace}
                await record_event(connection, account_event("references_load", detail))
            await connection.execute(_SQL["analyze"], timeout=60)


async def wait_for_loaders(connection: asyncpg.Connection) -> None:
    """Keep others from writing references until this transaction ends, however long it takes."""
    await connection.execute(_SQL["prepare_to_load"])
    await connection.execute(_SQL["wait_for_loaders"], timeout=LOAD_TIMEOUT_S)


async def copy_arrivals(
    connection: asyncpg.Connection, images: Sequence[ReferenceImage], embeddings: NDArray[np.floating]
) -> None:
    """Put images and their embeddings (as `load` takes them) into this transaction's `arrivals`."""
    _check(images, embeddings)
    records = (
        (*astuple(image), image.diagnosis in MALIGNANT, image.confirmed, embedding)
        for image, embedding in zip(images, embeddings, strict=True)
    )
    await connection.execute(_SQL["make_arrivals"], timeout=60)
    await connection.copy_records_to_table("arrivals", records=records, timeout=LOAD_TIMEOUT_S)


async def take_in_arrivals(connection: asyncpg.Connection, embedding_space: str) -> None:
    """Add what is in `arrivals` to the images and to a space, or bring it up to date."""
    await connection.execute(_SQL["take_in_space"], embedding_space)
    await connection.execute(_SQL["take_in_images"], timeout=LOAD_TIMEOUT_S)
    await connection.execute(_SQL["take_in_embeddings"], embedding_space, timeout=LOAD_TIMEOUT_S)


async def recount(connection: asyncpg.Connection) -> None:
    """Count the references of each sort anew, in every space."""
    await connection.execute(_SQL["recount"], timeout=LOAD_TIMEOUT_S)


async def index_space(
    connection: asyncpg.Connection, embedding_space: str, *, exact_below: int = EXACT_BELOW
) -> None:
    """Count what there is, and index each kind of a space that has `exact_below` images or more."""
    await recount(connection)
    for (statement,) in await connection.fetch(_SQL["index_statements"], embedding_space, exact_below):
        await connection.execute(statement, timeout=LOAD_TIMEOUT_S)


async def _search(
    connection: asyncpg.Connection, asked: Sequence[object], looked_through: Sequence[bool]
) -> Neighbours:
    rows = await connection.fetch(_SQL["nearest"], *asked, looked_through)
    similar = tuple(_case(row) for row in rows if row["role"] == "similar")
    alone = {row["role"]: _case(row) for row in rows if row["role"] != "similar"}
    malignant = sum(case.diagnosis in MALIGNANT for case in similar)
    return Neighbours(
        similar=similar,
        malignant_share=malignant / len(similar) if similar else None,
        nearest_benign=alone.get("nearest_benign"),
        nearest_malignant=alone.get("nearest_malignant"),
    )


def _case(row: asyncpg.Record) -> SimilarCase:
    values = dict(row)
    del values["role"]
    return SimilarCase(**{**values, "diagnosis": Diagnosis(values["diagnosis"])})


def _check(images: Sequence[ReferenceImage], embeddings: NDArray[np.floating]) -> None:
    if embeddings.shape != (len(images), DIMENSIONS):
        raise ValueError(f"Embeddings of shape {embeddings.shape} for {len(images)} images")
    if not np.allclose(np.linalg.norm(embeddings.astype(np.float32), axis=1), 1, atol=1e-2):
        raise ValueError("Embeddings must be finite and of unit norm")


_REFERENCE_PICTURES_SQL = queries("reference_cache")


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """What the cache holds of one reference image; `jpeg` and `sha256` (hex) None where only its vector is there."""

    jpeg: bytes | None
    sha256: str | None
    copyright_license: str
    attribution: str


async def find_picture(pool: Pool, isic_id: str) -> CachedPicture | None:
    """Look a reference image up; None when no reference has this id."""
    row = await pool.fetchrow(_REFERENCE_PICTURES_SQL["picture"], isic_id)
    return CachedPicture(**row) if row else None

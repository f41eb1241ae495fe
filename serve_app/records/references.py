"""Confirmed reference cases: the search for those most similar to an image, and how an embedding space is filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime

import asyncpg
import numpy as np
from numpy.typing import NDArray

from serve_app.audit.events import account_event
from serve_app.domain.assessment import EVERY_REFERENCE, Neighbours, ReferenceFilter, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.errors import Conflict, NotFound
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, Store, queries

#: Width of every embedding.
DIMENSIONS = 512
#: Fewer references of a kind (benign, malignant) have no index and are looked through one by one.
EXACT_BELOW = 4_000

_SQL = queries("references")
_SERVING = queries("serving")
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
                await _take_in(connection, images, embeddings, embedding_space)
                if replace:
                    await connection.execute(_SQL["leave_only_arrivals"], embedding_space)
                await _index_space(connection, embedding_space, exact_below=self._exact_below)
                await _record(connection, "references_load", embedding_space, len(images), replaced=replace)
            await connection.execute(_SQL["analyze"], timeout=60)


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


@dataclass(frozen=True, slots=True)
class CachedPicture:
    """What the cache holds of one reference image; `jpeg` and `sha256` (hex) None where only its vector is there."""

    jpeg: bytes | None
    sha256: str | None
    copyright_license: str
    attribution: str


async def find_picture(pool: Pool, isic_id: str) -> CachedPicture | None:
    """Look a reference image up; None when no reference has this id."""
    return await pool.find(CachedPicture, _SQL["picture"], isic_id)


@dataclass(frozen=True, slots=True)
class SpaceEmbedder:
    """What fills a space: two digests that differ may give one image two different vectors."""

    embedding_space: str
    model_id: str
    digest: str
    preprocess_version: str


@dataclass(frozen=True, slots=True)
class ReferencePicture:
    """A small JPEG of a reference image, without metadata; its sides in pixels, its SHA-256 in hex."""

    isic_id: str
    width: int
    height: int
    sha256: str
    jpeg: bytes


@dataclass(frozen=True, slots=True)
class FailedReference:
    """An image that could not be embedded: `cause` a word to count by, `detail` for a person."""

    isic_id: str
    cause: str
    detail: str


@dataclass(frozen=True, slots=True)
class SpaceSummary:
    """A space as operations see it; the embedder's fields are None where nothing is known of it."""

    embedding_space: str
    model_id: str | None
    embedder_digest: str | None
    images_expected: int | None
    completed_at: datetime | None
    images: int
    failures: int
    live: bool


class ReferenceCache(Store):
    """The writing side of the references; needs the owner's role."""

    async def begin(self, embedder: SpaceEmbedder, *, expected: int) -> None:
        """Claim a space for an embedder that will put `expected` images into it. Safe to repeat.

        Conflict when another embedder fills the space: its vectors cannot be compared with these.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_SQL["take_in_space"], embedder.embedding_space)
            known = await connection.fetchrow(_SQL["claim_space"], *astuple(embedder), expected)
            if known["embedder_digest"] != embedder.digest:
                raise Conflict(
                    f"{embedder.embedding_space} was filled by another build of {known['model_id']} "
                    f"(embedder {known['embedder_digest'][:12]}, not {embedder.digest[:12]}). Give the new "
                    "model a space of its own, or drop this one: `derm-cds references drop`."
                )

    async def embedder(self, embedding_space: str) -> SpaceEmbedder | None:
        """Say what fills a space; None when nobody has said so."""
        row = await self._pool.fetchrow(_SQL["embedder"], embedding_space)
        return SpaceEmbedder(*row) if row else None

    async def reassign(self, embedder: SpaceEmbedder, *, expected: int) -> None:
        """Say that all of a space was replaced by this embedder's vectors, and is complete; failures are forgotten."""
        async with self._pool.connection() as connection, connection.transaction():
            # Another embedder's failures say nothing of these.
            await connection.execute(_SQL["drop_embedder"], embedder.embedding_space)
            await connection.execute(_SQL["claim_space"], *astuple(embedder), expected)
            await connection.execute(_SQL["completed"], embedder.embedding_space)

    async def present(self, embedding_space: str, *, with_picture: bool) -> set[str]:
        """Name the images whose vector is there, and with `with_picture` their picture too."""
        rows = await self._pool.fetch(_SQL["present"], embedding_space, with_picture)
        return {row["isic_id"] for row in rows}

    async def take_in(
        self,
        embedding_space: str,
        images: Sequence[ReferenceImage],
        embeddings: NDArray[np.floating],
        *,
        pictures: Sequence[ReferencePicture] = (),
        failures: Sequence[FailedReference] = (),
    ) -> None:
        """Add or replace these references, all or nothing; doing it twice is doing it once.

        `embeddings`: (len(images), 512), finite, unit norm; ValueError when they are not. Conflict when an
        image lacks licence or attribution. Not indexed, nor counted, before `complete`.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await _take_in(connection, images, embeddings, embedding_space)
            await connection.execute(_SQL["forgive"], embedding_space)
            await connection.executemany(_SQL["take_in_picture"], map(astuple, pictures))
            rows = [(embedding_space, *astuple(failure)) for failure in failures]
            await connection.executemany(_SQL["take_in_failure"], rows)

    async def failures(self, embedding_space: str) -> Mapping[str, str]:
        """Name the images that could not be embedded, each with its cause."""
        rows = await self._pool.fetch(_SQL["failures"], embedding_space)
        return {row["isic_id"]: row["cause"] for row in rows}

    async def complete(self, embedding_space: str) -> None:
        """Count and index what is there, and note that the space is filled; with its audit event."""
        async with self._pool.connection() as connection:
            async with connection.transaction():
                await _wait_for_loaders(connection)
                await _index_space(connection, embedding_space)
                await connection.execute(_SQL["completed"], embedding_space)
                images = await connection.fetchval(_SQL["count"], embedding_space)
                await _record(connection, "references_embed", embedding_space, images)
            await connection.execute(_SQL["analyze"], timeout=LOAD_TIMEOUT_S)

    async def spaces(self) -> list[SpaceSummary]:
        """List all spaces, by name."""
        return await self._pool.find_all(SpaceSummary, _SQL["spaces"])

    async def count_unfit(self, embedding_space: str) -> int:
        """Count the vectors that are not of unit norm, to a halfvec's precision."""
        unfit: int = await self._pool.fetchval(_SQL["count_unfit"], embedding_space)
        return unfit

    async def sample(self, embedding_space: str, count: int) -> list[tuple[str, NDArray[np.float32]]]:
        """Take so many references, the same ones each time: isic_id and vector (512)."""
        rows = await self._pool.fetch(_SQL["sample"], embedding_space, count)
        return [(row["isic_id"], row["embedding"].to_numpy().astype(np.float32)) for row in rows]

    async def drop(self, embedding_space: str) -> int:
        """Delete a space's vectors, indexes and failures, with the audit event; returns how many vectors there were.

        Images that no other space holds go too, with their pictures. Conflict when the space is the live
        one, NotFound when there is no such space. Searches that have begun end as they began.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_SQL["prepare_to_load"])
            await connection.execute(_SERVING["lock_serving"])
            live = await connection.fetchrow(_SERVING["live_model"])
            if live is not None and live["embedding_space"] == embedding_space:
                raise Conflict(f"{embedding_space} is the space that the live model answers in.")
            await _wait_for_loaders(connection)
            for (statement,) in await connection.fetch(_SQL["drop_index_statements"], embedding_space):
                await connection.execute(statement, timeout=LOAD_TIMEOUT_S)
            said = await connection.execute(_SQL["drop_embeddings"], embedding_space, timeout=LOAD_TIMEOUT_S)
            dropped = int(said.removeprefix("DELETE "))
            if not await connection.fetchval(_SQL["drop_embedder"], embedding_space) and not dropped:
                raise NotFound(f"There is nothing in a space named {embedding_space!r}.")
            await connection.execute(_SQL["drop_unused_images"], timeout=LOAD_TIMEOUT_S)
            await connection.execute(_SQL["recount"], timeout=LOAD_TIMEOUT_S)
            await _record(connection, "references_drop", embedding_space, dropped)
            return dropped


async def _wait_for_loaders(connection: asyncpg.Connection) -> None:
    """Keep others from writing references until this transaction ends, however long it takes."""
    await connection.execute(_SQL["prepare_to_load"])
    await connection.execute(_SQL["wait_for_loaders"], timeout=LOAD_TIMEOUT_S)


async def _take_in(
    connection: asyncpg.Connection,
    images: Sequence[ReferenceImage],
    embeddings: NDArray[np.floating],
    embedding_space: str,
) -> None:
    """Add images and their embeddings (as `load` takes them) to a space; they stay in this transaction's `arrivals`."""
    if embeddings.shape != (len(images), DIMENSIONS):
        raise ValueError(f"Embeddings of shape {embeddings.shape} for {len(images)} images")
    if not np.allclose(np.linalg.norm(embeddings.astype(np.float32), axis=1), 1, atol=1e-2):
        raise ValueError("Embeddings must be finite and of unit norm")
    records = (
        (*astuple(image), image.diagnosis in MALIGNANT, image.confirmed, embedding)
        for image, embedding in zip(images, embeddings, strict=True)
    )
    await _wait_for_loaders(connection)
    await connection.execute(_SQL["make_arrivals"], timeout=60)
    await connection.copy_records_to_table("arrivals", records=records, timeout=LOAD_TIMEOUT_S)
    await connection.execute(_SQL["take_in_space"], embedding_space)
    await connection.execute(_SQL["take_in_images"], timeout=LOAD_TIMEOUT_S)
    await connection.execute(_SQL["take_in_embeddings"], embedding_space, timeout=LOAD_TIMEOUT_S)


async def _index_space(
    connection: asyncpg.Connection, embedding_space: str, *, exact_below: int = EXACT_BELOW
) -> None:
    """Count what there is, and index each kind of a space that has `exact_below` images or more."""
    await connection.execute(_SQL["recount"], timeout=LOAD_TIMEOUT_S)
    for (statement,) in await connection.fetch(_SQL["index_statements"], embedding_space, exact_below):
        await connection.execute(statement, timeout=LOAD_TIMEOUT_S)


async def _record(
    connection: asyncpg.Connection, action: str, embedding_space: str, references: int, **detail: object
) -> None:
    told = {"embedding_space": embedding_space, "references": references, **detail}
    await record_event(connection, account_event(action, told))

"""Filling an embedding space, piece by piece and resumably, and dropping one that nobody needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime

import asyncpg
import numpy as np
from numpy.typing import NDArray

from serve_app.audit.events import account_event
from serve_app.domain.errors import Conflict, NotFound
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, queries
from serve_app.records.references import (
    LOAD_TIMEOUT_S,
    ReferenceImage,
    copy_arrivals,
    index_space,
    recount,
    take_in_arrivals,
    wait_for_loaders,
)

_SQL = queries("reference_cache")
_REFERENCES = queries("references")
_SERVING = queries("serving")


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


class ReferenceCache:
    """The writing side of the references; needs the owner's role. RecordsUnavailable as the pool says."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def begin(self, embedder: SpaceEmbedder, *, expected: int) -> None:
        """Claim a space for an embedder that will put `expected` images into it. Safe to repeat.

        Conflict when another embedder fills the space: its vectors cannot be compared with these.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_REFERENCES["take_in_space"], embedder.embedding_space)
            known = await connection.fetchrow(_SQL["claim_space"], *astuple(embedder), expected)
            if known["embedder_digest"] != embedder.digest:
                raise Conflict(
                    f"{embedder.embedding_space} was filled by another build of {known['model_id']} "
                    f"(embedder {known['embedder_digest'][:12]}, not {embedder.digest[:12]}). Give the new "
                    "model a space of its own, or drop this one: `derm-cds references drop`."
                )
            await connection.execute(_SQL["begun"], embedder.embedding_space)

    async def embedder(self, embedding_space: str) -> SpaceEmbedder | None:
        """Say what fills a space; None when nobody has said so."""
        row = await self._pool.fetchrow(_SQL["embedder"], embedding_space)
        return SpaceEmbedder(*row) if row else None

    async def reassign(self, embedder: SpaceEmbedder, *, expected: int) -> None:
        """Say that all of a space was replaced by this embedder's vectors, and is complete; failures are forgotten."""
        async with self._pool.connection() as connection, connection.transaction():
            # Another embedder's failures say nothing of these.
            for step in ("drop_embedder", "drop_failures"):
                await connection.execute(_SQL[step], embedder.embedding_space)
            await connection.execute(_SQL["claim_space"], *astuple(embedder), expected)
            await connection.execute(_SQL["completed"], embedder.embedding_space)

    async def present(self, embedding_space: str, *, with_picture: bool) -> set[str]:
        """Name the images whose vector is there, and with `with_picture` their picture too."""
        rows = await self._pool.fetch(_SQL["present"], embedding_space, with_picture)
        return {row["isic_id"] for row in rows}

    async def count_present(self, embedding_space: str, *, with_picture: bool) -> int:
        """Count what `present` names."""
        count: int = await self._pool.fetchval(_SQL["count_present"], embedding_space, with_picture)
        return count

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
            await wait_for_loaders(connection)
            await copy_arrivals(connection, images, embeddings)
            await take_in_arrivals(connection, embedding_space)
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
                await wait_for_loaders(connection)
                await index_space(connection, embedding_space)
                await connection.execute(_SQL["completed"], embedding_space)
                images = await connection.fetchval(_REFERENCES["count"], embedding_space)
                await _record(connection, "references_embed", embedding_space, images)
            await connection.execute(_REFERENCES["analyze"], timeout=LOAD_TIMEOUT_S)

    async def spaces(self) -> list[SpaceSummary]:
        """List all spaces, by name."""
        return [SpaceSummary(**row) for row in await self._pool.fetch(_SQL["spaces"])]

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
            await connection.execute(_REFERENCES["prepare_to_load"])
            await connection.execute(_SERVING["lock_serving"])
            if await connection.fetchval(_SQL["is_live"], embedding_space):
                raise Conflict(f"{embedding_space} is the space that the live model answers in.")
            await wait_for_loaders(connection)
            dropped = await _drop(connection, embedding_space)
            await _record(connection, "references_drop", embedding_space, dropped)
            return dropped


async def _record(connection: asyncpg.Connection, action: str, embedding_space: str, references: int) -> None:
    detail = {"embedding_space": embedding_space, "references": references}
    await record_event(connection, account_event(action, detail))


async def _drop(connection: asyncpg.Connection, embedding_space: str) -> int:
    for (statement,) in await connection.fetch(_SQL["drop_index_statements"], embedding_space):
        await connection.execute(statement, timeout=LOAD_TIMEOUT_S)
    deletions = []
    for step in ("drop_embeddings", "drop_failures", "drop_embedder"):
        said = await connection.execute(_SQL[step], embedding_space, timeout=LOAD_TIMEOUT_S)
        deletions.append(int(said.removeprefix("DELETE ")))
    if not any(deletions):
        raise NotFound(f"There is nothing in a space named {embedding_space!r}.")
    await connection.execute(_SQL["drop_unused_images"], timeout=LOAD_TIMEOUT_S)
    await recount(connection)
    return deletions[0]

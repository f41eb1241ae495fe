"""Which model answers: one row in the database, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.records.pool import Pool
from serve_app.records.sql import queries

_SQL = queries("serving")


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The model that answers, its folder's digest, and the space its embeddings live in."""

    model_id: str
    model_digest: str
    embedding_space: str


async def live_model(pool: Pool) -> LiveModel | None:
    """Say which model answers; None when none has been published yet."""
    row = await pool.fetchrow(_SQL["live_model"])
    return LiveModel(*row) if row else None


async def publish(pool: Pool, model: LiveModel) -> None:
    """Let this model answer from the next request on; needs the owner's role. Safe to repeat.

    Conflict when the same model and digest are already known in another space.
    """
    await pool.execute(_SQL["publish"], model.model_id, model.model_digest, model.embedding_space)

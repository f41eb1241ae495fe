"""Rollback: the same row back, when what it points to is still whole."""

from __future__ import annotations

from pathlib import Path

from data_jobs.promotion.candidate import PromotionRefused, open_whole
from model_store.registry import ModelStore
from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import open_pool
from serve_app.records.references import ReferenceStore
from serve_app.records.serving import Approval, LiveModel, live_model, publications, publish_when_ready


async def roll_back(owner_dsn: str, models: Path, *, approved_by: str, reason: str) -> LiveModel:
    """Let the model answer that answered before the last publication; returns it.

    Repeated, it goes back further, publication by publication. Raises PromotionRefused when
    there is none before, or its folder or references are not what they were; Conflict when another model
    is published meanwhile, or this one is not ready in every replica of a running service in time. The live model then goes on answering.
    """
    pool = await open_pool(owner_dsn, minimum=0, maximum=1)
    try:
        answering = await live_model(pool)
        standing = await publications(pool, limit=2, standing=True)
        if answering is None or len(standing) < 2:
            name = answering.model_id if answering else "no model"
            raise PromotionRefused(f"{name} answers, and nothing was published before it to go back to.")
        current, earlier = standing
        try:
            model = open_whole(ModelStore(models), earlier.model.model_id)
        except ModelContractError as error:
            raise PromotionRefused(f"{earlier.model.model_id} cannot answer again: {error}") from error
        if model.digest != earlier.model.model_digest:
            raise PromotionRefused(
                f"{model.folder} is not what it was when it answered: its manifest has another digest. "
                "Put the folder back as it was, or promote it as a model of its own."
            )
        expected = model.manifest.live_space.count
        found = await ReferenceStore(pool).count(earlier.model.embedding_space)
        if found < expected:
            raise PromotionRefused(
                f"{earlier.model.embedding_space} holds {found} references of {expected}: load them with "
                f"`derm-cds references load --model {earlier.model.model_id}`, which also lets it answer."
            )
        approval = Approval("rollback", approved_by, reason, takes_back=current.publication_id)
        await publish_when_ready(pool, earlier.model, approval, over=answering)
        return earlier.model
    finally:
        await pool.close()

"""The live model as the interface sees it: the one row, read again every few seconds."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from time import monotonic

from model_store.registry import ModelStore
from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import Pool
from serve_app.records.serving import LiveModel, live_model

#: How long after a promotion a replica may still start requests on the model before.
MAX_AGE_S = 2.0
#: How long a model's folder may take to be read through.
VERIFY_S = 60.0

_log = logging.getLogger("derm.live_model")


class LiveModelWatch:
    """Remembers the live model for at most MAX_AGE_S.

    A request reads it once and carries it through every stage, so that no answer mixes two
    models' spaces. A model that is not whole in this node's store does not take over: the one
    before goes on answering, and `refused` says why.
    """

    def __init__(self, pool: Pool, models: Path) -> None:
        self._pool = pool
        self._models = models
        self._live: LiveModel | None = None
        self._read_at = 0.0
        self.refused: str | None = None

    async def current(self) -> LiveModel:
        """The live model. Raises RecordsUnavailable, or ModelContractError when none is published."""
        if self._live is None or monotonic() - self._read_at > MAX_AGE_S:
            return await self.refresh()
        return self._live

    async def refresh(self) -> LiveModel:
        """Read the row now."""
        published = await live_model(self._pool)
        if published is None:
            raise ModelContractError("No model is published: run `derm-cds references load`.")
        if published == self._live:
            self.refused = None
        elif await self._may_answer(published):
            self._live = published
        self._read_at = monotonic()
        if self._live is None:
            raise ModelContractError(self.refused or "")
        return self._live

    async def _may_answer(self, published: LiveModel) -> bool:
        """Whether the model that the row names is here, whole, and the one that was published."""
        try:
            async with asyncio.timeout(VERIFY_S):
                await asyncio.to_thread(_verify, self._models, published)
        except (ModelContractError, TimeoutError) as error:
            if self.refused is None:
                _log.error(
                    "%(model_id)s does not take over: %(cause)s",
                    {"model_id": published.model_id, "cause": str(error)},
                )
            self.refused = str(error) or f"{published.model_id} could not be read in time."
            return False
        self.refused = None
        return True


def _verify(models: Path, published: LiveModel) -> None:
    # A store of its own: it keeps what it has verified, and the folder may have been mended since.
    model = ModelStore(models).open(published.model_id)
    if model.digest != published.model_digest:
        raise ModelContractError(
            f"{published.model_id} is not the folder that was published "
            f"({model.digest[:12]}, not {published.model_digest[:12]})."
        )
    if published.embedding_space not in {space.embedding_space for space in model.manifest.spaces}:
        raise ModelContractError(f"{published.model_id} has no space {published.embedding_space!r}.")

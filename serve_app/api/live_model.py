"""The live model as the interface sees it: the one row, read again every few seconds."""

from __future__ import annotations

from time import monotonic

from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import Pool
from serve_app.records.serving import LiveModel, live_model

#: How long after a promotion a replica may still start requests on the model before.
MAX_AGE_S = 2.0


class LiveModelWatch:
    """Remembers the live model for at most MAX_AGE_S.

    A request reads it once and carries it through every stage, so that no answer mixes two
    models' spaces.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._live: LiveModel | None = None
        self._read_at = 0.0

    async def current(self) -> LiveModel:
        """The live model. Raises RecordsUnavailable, or ModelContractError when none is published."""
        if self._live is None or monotonic() - self._read_at > MAX_AGE_S:
            return await self.refresh()
        return self._live

    async def refresh(self) -> LiveModel:
        """Read the row now."""
        live = await live_model(self._pool)
        if live is None:
            raise ModelContractError("No model is published: run `derm-cds references load`.")
        self._live, self._read_at = live, monotonic()
        return live

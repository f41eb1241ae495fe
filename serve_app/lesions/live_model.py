"""The live model as the interface sees it: the one row, read every few seconds, and made ready before it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import logging
from pathlib import Path
from time import monotonic
from uuid import UUID, uuid4

from model_store.registry import ModelStore
from serve_app.domain.errors import DermError, ModelContractError, StageFailed
from serve_app.records.pool import Pool
from serve_app.records.serving import LiveModel, announced, forget_replica, live_model, report_replica

#: How long a model's folder may take to be read through.
VERIFY_S = 60.0
#: How often the row is read.
PERIOD_S = 2.0
#: How often every replica of every stage is told what to hold although nothing changed: one that came up
#: meanwhile has read the row itself, but perhaps a moment too early.
TELL_AGAIN_AFTER_S = 60.0

Warm = Callable[[Sequence[LiveModel]], Awaitable[Sequence[Mapping[str, str]]]]

_log = logging.getLogger("derm.live_model")


class LiveModelWatch:
    """Knows the live model, and has the stages make the next one ready; every ingress replica has one.

    A request asks once and carries the answer through every stage, so that no answer mixes two models' spaces.
    A model takes over here when it is whole in this node's store and every replica of every stage has it in
    memory; until then the one before goes on answering, and `refused` says what is wrong, if anything is.
    """

    def __init__(self, pool: Pool, models: Path, warm: Warm) -> None:
        self._pool, self._models, self._warm = pool, models, warm
        self._live: LiveModel | None = None
        self._one_at_a_time = asyncio.Lock()
        #: What the stages were told last, and when.
        self._held: tuple[LiveModel, ...] = ()
        self._told_at = 0.0
        self._replica_id = uuid4()
        self._ready: UUID | None = None
        self._fault: str | None = None
        self.refused: str | None = None

    async def current(self) -> LiveModel:
        """The live model; waits for nothing once there is one.

        Raises RecordsUnavailable, or ModelContractError when none is published.
        """
        return self._live or await self.refresh()

    async def refresh(self) -> LiveModel:
        """Read the row now; a model that is new there takes over before this returns, or is refused."""
        async with self._one_at_a_time:
            published = await live_model(self._pool)
            if published is None:
                raise ModelContractError("No model is published: run `derm-cds references load`.")
            if published == self._live:
                self._live, self.refused = published, None  # the site's operating points may be others
            elif await self._may_answer(published):
                self._live = published
            if self._live is None:
                raise ModelContractError(self.refused or "")
            return self._live

    async def report(self) -> None:
        """Say that this replica is up and what it found ready; apart from `follow`, which may wait."""
        await report_replica(self._pool, self._replica_id, ready=self._ready, fault=self._fault)

    async def leave(self) -> None:
        """Say that this replica stops."""
        await forget_replica(self._pool, self._replica_id)

    async def follow(self) -> None:
        """Follow the row; have the stages hold the live model, and the candidate, if one is announced."""
        live = await self.refresh()
        candidate = await announced(self._pool)
        held = (live,) if candidate is None or candidate.model == live else (live, candidate.model)
        due = monotonic() - self._told_at > TELL_AGAIN_AFTER_S
        try:
            # With a candidate in every round: a replica may come up while somebody waits.
            if held != self._held or len(held) > 1 or due:
                if candidate is not None and self._ready != candidate.announcement:
                    await asyncio.to_thread(_verify, self._models, candidate.model)
                await self._hold(held)
            self._ready, self._fault = candidate.announcement if candidate else None, None
        except DermError as error:
            if self._fault is None:
                _log.error("A stage is not ready: %s", error)
            self._ready, self._fault = None, str(error)

    async def _may_answer(self, published: LiveModel) -> bool:
        """Whether the model that the row names is here, whole, the one that was published, and ready everywhere."""
        try:
            async with asyncio.timeout(VERIFY_S):
                await asyncio.to_thread(_verify, self._models, published)
            # The first model of this replica is not waited for: the stages read the row when they start.
            if self._live is not None:
                await self._hold((published, self._live))
        except (DermError, TimeoutError) as error:
            if self.refused is None:
                model = {"model_id": published.model_id}
                _log.error("The published model does not take over: %s", error, extra=model)
            self.refused = str(error) or f"{published.model_id} could not be read in time."
            return False
        self.refused = None
        return True

    async def _hold(self, models: tuple[LiveModel, ...]) -> None:
        """Return when every replica of every stage has these models in memory; it may let go of all others.

        Raises StageFailed when one has not, or has another folder by that name.
        """
        for digests in await self._warm(models):
            for model in models:
                if digests.get(model.model_id, model.model_digest) != model.model_digest:
                    raise StageFailed(
                        f"A stage holds another {model.model_id} than the one that was published."
                    )
        self._held, self._told_at = models, monotonic()


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

"""Which models a stage has ready when it starts: the live one and a candidate, so that no request waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
import logging

from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import open_pool
from serve_app.records.serving import LiveModel, announced, live_model
from serve_app.settings import Settings

_log = logging.getLogger("derm.live_model")


async def warm_at_start(settings: Settings, warm: Callable[[Sequence[LiveModel]], object]) -> None:
    """Have a stage hold the models that the database names, read over a connection of its own, closed again.

    Raises RecordsUnavailable when the database does not answer, ModelContractError when no model has been
    published or the live one must not be loaded. A candidate that must not be loaded is the publisher's affair.
    """
    pool = await open_pool(
        settings.database_url.get_secret_value(), minimum=0, maximum=1, timeout_s=settings.database_timeout_s
    )
    try:
        live, candidate = await live_model(pool), await announced(pool)
    finally:
        await pool.close()
    if live is None:
        raise ModelContractError("No model is published: run `derm-cds references load`.")
    await asyncio.to_thread(warm, (live,))
    if candidate is not None:
        try:
            await asyncio.to_thread(warm, (live, candidate.model))
        except ModelContractError as error:
            _log.error("A candidate is not ready: %s", error)

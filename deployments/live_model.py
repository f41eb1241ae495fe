"""Which model a stage has ready when it starts: the live one, so that no first request waits."""

from __future__ import annotations

from serve_app.domain.errors import ModelContractError
from serve_app.records.pool import open_pool
from serve_app.records.serving import LiveModel, live_model
from serve_app.settings import Settings


async def live_model_at_start(settings: Settings) -> LiveModel:
    """Read the live model over a connection of its own, closed again.

    Raises RecordsUnavailable when the database does not answer, ModelContractError when no
    model has been published.
    """
    pool = await open_pool(
        settings.database_url.get_secret_value(),
        minimum=0,
        maximum=1,
        timeout_s=settings.database_timeout_s,
    )
    try:
        live = await live_model(pool)
    finally:
        await pool.close()
    if live is None:
        raise ModelContractError("No model is published: run `derm-cds references load`.")
    return live

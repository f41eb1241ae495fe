"""The database that a benchmark runs on: migrated, with references, a patient and a token."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
import os
from pathlib import Path

from cluster.node_files import read_service_environment, write_service_environment
from cluster.postgres import EmbeddedPostgres
from data_jobs.references.load import publish_bundled
from model_store.registry import ModelStore
from serve_app.access.tokens import mint_token
from serve_app.audit.events import account_event
from serve_app.records.access import AccessStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool
from serve_app.settings import REPOSITORY


def prepare_records(home: Path, postgres: EmbeddedPostgres, *, clinician: str, patient: str) -> str:
    """Set everything up below `home`; returns a day's token for the clinician."""
    urls = postgres.ensure()
    write_service_environment(home, urls)
    models = Path(os.environ.get("DERM_MODELS", REPOSITORY / "model_store" / "models"))
    (model_id,) = ModelStore(models)

    async def fill() -> None:
        await migrate(urls.owner, application_role="derm_app")
        await publish_bundled(urls.owner, models, model_id)
        pool = await open_pool(urls.owner, minimum=0, maximum=1)
        since = datetime(2026, 1, 1, tzinfo=UTC)
        event = account_event("assign", patient_id=patient)
        await AccessStore(pool).assign(patient, clinician, starts_at=since, ends_at=None, event=event)
        await pool.close()

    asyncio.run(fill())
    return mint_token(
        secret=read_service_environment(home)["DERM_TOKEN_SECRET"],
        issuer="derm-cds",
        audience="derm-cds",
        subject=clinician,
        roles=["clinician"],
        lifetime_s=86_400,
    )

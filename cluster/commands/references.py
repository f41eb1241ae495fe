"""`derm-cds references load`: a model's confirmed cases into the database, and the model live."""

from __future__ import annotations

import argparse
import asyncio
import sys

from cluster.database import database
from cluster.node_files import model_folder
from cluster.prepare import choose_model
from data_jobs.references.load import publish_bundled
from serve_app.records.pool import open_pool
from serve_app.records.serving import live_model


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `references`."""
    parser.add_argument("action", choices=("load",), help="load a model's references and let it answer")
    parser.add_argument("--model", help="default: the one that answers now, or the only one")
    parser.set_defaults(run=_load)


def _load(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        model_id, loaded = asyncio.run(_publish(urls.owner, arguments.model))
    sys.stdout.write(f"{model_id} answers; {loaded or 'no new'} references loaded\n")
    return 0


async def _publish(dsn: str, wanted: str | None) -> tuple[str, int]:
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        live = await live_model(pool)
    finally:
        await pool.close()
    models = model_folder()
    model_id = choose_model(models, wanted=wanted, live=live.model_id if live else None)
    return model_id, await publish_bundled(dsn, models, model_id)

"""Runs in a process of its own before the graph is deployed: schema, references, a first request.

`python -m cluster.prepare`, with the node's environment set and the owner's URL in
DERM_OWNER_DATABASE_URL. Each line it prints is a step done, for the person at the terminal;
the last one is what a first request takes, as JSON. The supervisor, which stays, is spared its 60 MB.
"""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
import json
import os
from pathlib import Path
import sys

from pydantic import ValidationError

from cluster.node_files import application_role, explain, own_database
from cluster.safety import Finding, look_at, transport_findings, trust_findings
from data_jobs.references.load import publish_bundled
from data_jobs.sample_lesion import write_sample
from model_store.registry import ModelStore
from serve_app.access.tokens import issue_token
from serve_app.audit.events import account_event
from serve_app.domain.errors import DermError, ModelContractError
from serve_app.records.access import AccessStore, CareAssignment
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import Pool, open_pool
from serve_app.records.retention import refuse_lost_keys
from serve_app.records.serving import live_model
from serve_app.settings import Settings, load_settings

CLINICIAN = "dr-demo"
PATIENT = "demo-patient"
_ASSIGNED_FROM = datetime(2026, 1, 1, tzinfo=UTC)
_LOAD_TIMEOUT_S = 60
#: The file of a model store that names the model a new node answers with, of several.
DEFAULT_NAME = "default"


async def prepare(settings: Settings, *, model: str | None) -> dict[str, str] | None:
    """Bring the database up to date and let a model answer; return what a first request takes.

    That is a token, a patient in the caller's care, and an image; None in production, which has no demonstration.

    In production DermError for a database that is not safe: see cluster.safety.
    """
    urls = own_database(settings.home)
    if urls is None:
        raise DermError("DERM_DATABASE_URL is not set.")
    if settings.env == "production":
        _refuse(
            [*trust_findings(settings, urls), *transport_findings(urls)]
        )  # before a password goes that way
    applied = await migrate(urls.owner, application_role=application_role(urls))
    print(f"schema: {', '.join(applied)} applied" if applied else "schema: up to date", flush=True)
    if settings.env == "production":
        _refuse(await look_at(urls))
    pool = await open_pool(urls.owner, minimum=0, maximum=1, timeout_s=_LOAD_TIMEOUT_S)
    try:
        # Each replica looks as well; here somebody is at the terminal.
        await refuse_lost_keys(pool, settings.files.keystore)
        live = await live_model(pool)
        chosen = choose_model(settings.models, wanted=model, live=live.model_id if live else None)
        loaded = await publish_bundled(urls.owner, settings.models, chosen)
        print(
            f"model: {chosen} answers; references: {f'{loaded} loaded' if loaded else 'already there'}",
            flush=True,
        )
        # An issuer that publishes its keys signs every token itself, the demonstration's too.
        demonstrates = settings.env == "development" and not settings.token_jwks
        return await _demonstrate(settings, pool) if demonstrates else None
    finally:
        await pool.close()


def _refuse(found: list[Finding]) -> None:
    """Raise DermError where anything is unsafe, with all of it in one line."""
    if found:
        advice = "; ".join(finding.advice for finding in found)
        raise DermError(f"Refused in production, this node is not safe for patients' records: {advice}.")


def choose_model(models: Path, *, wanted: str | None, live: str | None) -> str:
    """The model to answer: the one asked for, else the one that answered before, else the only one there is.

    Of several it is the one that the store's file `default` names, as a release does: never one that was merely imported.
    """
    there = list(ModelStore(models))
    if chosen := wanted or live:
        if chosen in there:
            return chosen
        answered = "" if wanted else ", which answered so far: say which shall from now on, with --model"
        raise ModelContractError(
            f"{models} has no model {chosen}{answered}. There: {', '.join(there) or 'none'}."
        )
    if not there:
        raise ModelContractError(f"{models} holds no model (DERM_MODELS).")
    named = models / DEFAULT_NAME
    if len(there) > 1 and named.exists() and (default := named.read_text().strip()) in there:
        return default
    if len(there) > 1:
        raise ModelContractError(
            f"{models} has {len(there)} models ({', '.join(there)}): say which, with --model."
        )
    return there[0]


async def _demonstrate(settings: Settings, pool: Pool) -> dict[str, str]:
    if not (await LesionStore(pool).access(CLINICIAN, PATIENT)).assigned:
        event = account_event("assign", {"subject": CLINICIAN}, patient_id=PATIENT)
        care = CareAssignment(PATIENT, CLINICIAN, _ASSIGNED_FROM, None)
        await AccessStore(pool).assign(care, event=event)
    image = settings.home / "sample-lesion.jpg"
    if not image.exists():
        write_sample(image)
    token = issue_token(settings, CLINICIAN, ["clinician"])
    return {"token": token, "patient_id": PATIENT, "image": str(image)}


def main() -> int:
    """Prepare; on an expected failure, say it in one line and return 1."""
    parser = argparse.ArgumentParser(description="Prepare the database for serving.")
    parser.add_argument("--model")
    model = parser.parse_args().model
    os.umask(0o077)
    try:
        first = asyncio.run(prepare(load_settings(), model=model))
    except (DermError, ValidationError) as error:
        print(explain(error) if isinstance(error, ValidationError) else error, file=sys.stderr)
        return 1
    print(json.dumps(first))
    return 0


if __name__ == "__main__":
    sys.exit(main())

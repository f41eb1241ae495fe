"""`derm-cds migrate` and `derm-cds assign`: the clinical database at a desk."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime
import sys

from cluster.database import application_role, database
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import migrate
from serve_app.records.pool import open_pool


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `migrate` or `assign`."""
    if name == "migrate":
        parser.set_defaults(run=_migrate)
        return
    parser.add_argument("--patient", required=True, help="the PMS's id of the patient")
    parser.add_argument("--clinician", required=True, help="`sub` of the clinician's tokens")
    parser.add_argument("--until", type=_instant, help="RFC 3339 time the care ends (default: open)")
    parser.set_defaults(run=_assign)


def _migrate(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        applied = asyncio.run(migrate(urls.owner, application_role=application_role(urls)))
    sys.stdout.write("".join(f"applied {name}\n" for name in applied) or "up to date\n")
    return 0


def _assign(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        asyncio.run(_record(urls.owner, arguments.patient, arguments.clinician, arguments.until))
    until = f"until {arguments.until.isoformat()}" if arguments.until else "until further notice"
    sys.stdout.write(f"{arguments.patient} is in the care of {arguments.clinician} {until}\n")
    return 0


async def _record(dsn: str, patient: str, clinician: str, until: datetime | None) -> None:
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        await LesionStore(pool).assign(patient, clinician, starts_at=datetime.now(UTC), ends_at=until)
    finally:
        await pool.close()


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)

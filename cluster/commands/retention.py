"""`derm-cds retention`: closing patients' records, and erasing what is past its time."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
import sys
from typing import TypeVar

from cluster.commands.access import TIME, instant, patient_id
from cluster.database import database
from cluster.key_backup import existing_keystore
from serve_app.audit.events import os_account
from serve_app.domain.errors import Conflict
from serve_app.erasure.eraser import Eraser
from serve_app.erasure.sweeping import erase_expired
from serve_app.keys.keystore import KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.records.erasures import ErasureStore
from serve_app.records.pool import Pool, open_pool
from serve_app.records.retention import RetentionStore
from serve_app.settings import load_settings

_Result = TypeVar("_Result")


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `retention`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    close = actions.add_parser("close", help="close a patient's record: its images' retention begins")
    close.add_argument("patient", type=patient_id, help="the PMS's id of the patient")
    close.add_argument("--at", type=instant, help=f"{TIME} it was closed (default: now)")
    close.set_defaults(run=_close)
    reopen = actions.add_parser("reopen", help="open a closed record again")
    reopen.add_argument("patient")
    reopen.set_defaults(run=_reopen)
    run = actions.add_parser("run", help="erase the images past their retention, but for held ones")
    run.add_argument("--days", type=int, help="days after the record was closed ($DERM_RETENTION_DAYS)")
    sure = run.add_mutually_exclusive_group(required=True)
    sure.add_argument("--dry-run", action="store_true", help="only say how many there are")
    sure.add_argument("--yes", action="store_true", help="erase them: there is no way back")
    run.set_defaults(run=_run)


def _close(arguments: argparse.Namespace) -> int:
    closed_at = arguments.at or datetime.now(UTC)
    _ask(
        arguments.home,
        lambda pool: RetentionStore(pool).close(arguments.patient, closed_at=closed_at, actor=os_account()),
    )
    sys.stdout.write(f"the record of {arguments.patient} is closed as of {closed_at.isoformat()}\n")
    return 0


def _reopen(arguments: argparse.Namespace) -> int:
    _ask(
        arguments.home,
        lambda pool: RetentionStore(pool).reopen(arguments.patient, actor=os_account()),
    )
    sys.stdout.write(f"the record of {arguments.patient} is open\n")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    settings = load_settings()
    days = settings.retention_days if arguments.days is None else arguments.days
    if days is None:
        raise Conflict("Nothing expires: set DERM_RETENTION_DAYS, or give --days.")
    if days < 0:
        raise Conflict("--days: 0 or more.")
    counted = _ask(arguments.home, lambda pool: RetentionStore(pool).count(days=days))
    sys.stdout.write(
        f"{counted.closed} closed records; {counted.expired} images are more than {days} days past, "
        f"{counted.held} of them under a legal hold\n"
    )
    if arguments.dry_run:
        return 0
    with closing(KeyStore(existing_keystore(settings.home), open_key_provider(settings))) as keys:

        async def erase(pool: Pool) -> int:
            eraser = Eraser(ErasureStore(pool), keys, tells_pms=settings.pms_deliver)
            erased = await erase_expired(RetentionStore(pool), eraser, days=days, actor=os_account())
            await eraser.finish_accepted(older_than_s=0)
            return erased

        sys.stdout.write(f"{_ask(arguments.home, erase)} images erased\n")
    return 0


def _ask(home: Path, ask: Callable[[Pool], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(pool)
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.owner))

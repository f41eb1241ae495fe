"""`derm-cds hold`: legal holds, which keep images from being erased."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
import sys
from typing import TypeVar
from uuid import UUID

from cluster.commands.access import patient_id
from cluster.database import database
from serve_app.audit.events import os_account
from serve_app.records.erasures import Held, HoldStore
from serve_app.records.pool import open_pool

_Result = TypeVar("_Result")


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `hold`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    begin = actions.add_parser("set", help="let nobody erase a patient's, a lesion's or one image")
    what = begin.add_mutually_exclusive_group(required=True)
    what.add_argument("--patient", type=patient_id, help="the PMS's id: all images, those to come too")
    what.add_argument("--lesion", type=UUID, help="all images of it, those to come too")
    what.add_argument("--image", type=UUID)
    begin.add_argument("--reason", required=True, help="a case number, no names; up to 200 characters")
    begin.set_defaults(run=_set)
    release = actions.add_parser("release", help="take a hold out of force")
    release.add_argument("hold", type=UUID, help="its id, as `hold list` says it")
    release.set_defaults(run=_release)
    listed = actions.add_parser("list", help="list the holds in force")
    listed.add_argument("--all", action="store_true", help="those that were released, too")
    listed.set_defaults(run=_list)


def _set(arguments: argparse.Namespace) -> int:
    held = Held(patient_id=arguments.patient, lesion_id=arguments.lesion, image_id=arguments.image)
    hold_id = _ask(arguments.home, lambda holds: holds.set(held, reason=arguments.reason, actor=os_account()))
    sys.stdout.write(f"{hold_id} is in force\n")
    return 0


def _release(arguments: argparse.Namespace) -> int:
    _ask(arguments.home, lambda holds: holds.release(arguments.hold, actor=os_account()))
    sys.stdout.write(f"{arguments.hold} is released\n")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    for hold in _ask(arguments.home, lambda holds: holds.find(released=arguments.all)):
        on = next(
            f"{kind} {value}"
            for kind, value in (
                ("patient", hold.patient_id),
                ("lesion", hold.lesion_id),
                ("image", hold.image_id),
            )
            if value is not None
        )
        since = f"{hold.set_at:%Y-%m-%d} by {hold.set_by}"
        until = f", released {hold.released_at:%Y-%m-%d} by {hold.released_by}" if hold.released_at else ""
        sys.stdout.write(f"{hold.hold_id} {on}: {hold.reason} (set {since}{until})\n")
    return 0


def _ask(home: Path, ask: Callable[[HoldStore], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(HoldStore(pool))
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.owner))

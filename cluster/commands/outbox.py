"""`derm-cds outbox`: what the PMS has not been told of yet, and what was given up."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
import sys
from typing import TypeVar
from uuid import UUID, uuid4

from cluster.database import database
from serve_app.audit.events import os_account
from serve_app.domain.errors import NotFound
from serve_app.records.outbox import Outbox, UndeliveredMessage
from serve_app.records.pool import open_pool

_Result = TypeVar("_Result")


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `outbox`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    status = actions.add_parser(
        "status", help="count what waits and what is dead; exit code 1 if any is dead"
    )
    status.set_defaults(run=_status)
    listed = actions.add_parser("list", help="list what was not delivered, oldest first")
    listed.add_argument("--dead", action="store_true", help="only what was given up")
    listed.add_argument("--limit", type=int, default=100, help="how many at most (default: %(default)s)")
    listed.set_defaults(run=_list)
    retry = actions.add_parser("retry", help="have messages sent at once, with their whole time again")
    which = retry.add_mutually_exclusive_group(required=True)
    which.add_argument("message", type=UUID, nargs="?", help="id of one message")
    which.add_argument("--dead", action="store_true", help="all that were given up")
    retry.set_defaults(run=_retry)


def _status(arguments: argparse.Namespace) -> int:
    counts = _ask(arguments.home, lambda outbox: outbox.counts())
    oldest = "" if counts.oldest_waiting_s is None else f", the oldest for {counts.oldest_waiting_s:.0f} s"
    sys.stdout.write(f"{counts.waiting} wait{oldest}; {counts.dead} dead\n")
    return 1 if counts.dead else 0


def _list(arguments: argparse.Namespace) -> int:
    found = _ask(arguments.home, lambda outbox: outbox.list(dead_only=arguments.dead, limit=arguments.limit))
    sys.stdout.write("".join(_line(message) for message in found) or "nothing\n")
    return 0


def _line(message: UndeliveredMessage) -> str:
    state = "dead" if message.dead_at else f"waits until {message.due_at.isoformat(timespec='seconds')}"
    return (
        f"{message.message_id} encounter {message.encounter_id}, assessment {message.assessment_id}: {state}; "
        f"queued {message.queued_at.isoformat(timespec='seconds')}, {message.attempts} attempts, "
        f"last error {message.last_error or 'none'}\n"
    )


def _retry(arguments: argparse.Namespace) -> int:
    actor, request_id = os_account(), str(uuid4())
    revived = _ask(
        arguments.home, lambda outbox: outbox.retry(arguments.message, actor=actor, request_id=request_id)
    )
    if arguments.message is not None and not revived:
        raise NotFound("No message of that id waits or is dead: `derm-cds outbox list` names them.")
    sys.stdout.write(f"{revived} will be sent at once\n")
    return 0


def _ask(home: Path, ask: Callable[[Outbox], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(Outbox(pool))
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.app))

"""What a restore must not undo: access taken away, holds set, records opened again, since the backup was made.

Only what takes away or keeps is carried over. Care that began, holds released and records closed since are undone, as
everything else is: the service does less then than it should, and erases nothing.

What is absent says something only in a database that goes on from the backup: the one that has the backup's last event.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
import json
from pathlib import Path
from typing import Any

import asyncpg

from cluster.postgres import DATABASE, OWNER
from serve_app.audit.events import account_event
from serve_app.records.audit_log import record_event
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

_ALWAYS = ("revocations", "legal_holds")
_FROM_A_SUCCESSOR = ("withdrawn_care", "ended_care", "ended_emergencies", "reopened_records", "closed_later")
#: In the audit event of each change.
CARRIED = {"carried_over": True}


@dataclass(frozen=True, slots=True)
class Replaced:
    """What the database that is replaced says (JSON, by table), and whether it goes on from the backup."""

    rows: str
    follows: bool


async def newest_event(at: Mapping[str, str]) -> tuple[Any, ...]:
    """The last event of the audit log of a database; empty without one. `at`: where psql would find it."""
    async with _connected(at) as connection:
        return tuple(await connection.fetchrow(_SQL["newest_event"]) or ())


async def read_replaced(at: Mapping[str, str], newest: tuple[Any, ...]) -> Replaced:
    """Read what is to be carried over into a backup with this `newest` event."""
    async with _connected(at) as connection:
        follows = bool(newest) and await connection.fetchval(_SQL["has_event"], *newest)
        return Replaced(await connection.fetchval(_SQL["read"]), follows)


async def carry_over(
    at: Mapping[str, str], replaced: Replaced | None, detail: Mapping[str, object]
) -> tuple[int, str | None]:
    """Carry it over and record the restore (`detail`), in one transaction; returns how many changes, and what is in doubt.

    In doubt is what was done since the backup, and None is as it should be.
    """
    names: tuple[str, ...] = ()
    doubt: str | None = "the database that it replaced could not be read"
    if replaced is not None:
        names, doubt = _ALWAYS, "the database that it replaced does not go on from the backup"
        if replaced.follows:
            names, doubt = (*_ALWAYS, *_FROM_A_SUCCESSOR), None
    carried = 0
    async with _connected(at) as connection, connection.transaction():
        for name in names:
            for row in await connection.fetch(_SQL[name], replaced.rows if replaced else "{}"):
                about = dict(row)
                action, said = about.pop("action"), json.loads(about.pop("detail"))
                await record_event(connection, account_event(action, said | CARRIED, **about))
                carried += 1
        event = account_event("restore", {**detail, "changes": carried, "in_doubt": doubt})
        await record_event(connection, event)
    return carried, doubt


@asynccontextmanager
async def _connected(at: Mapping[str, str]) -> AsyncIterator[asyncpg.Connection]:
    # As the owner of the tables: whatever it has made of them, a superuser's rights are not lent to it.
    where = {"host": at["PGHOST"], "port": int(at["PGPORT"]), "user": OWNER, "database": DATABASE}
    connection = await asyncpg.connect(**where)
    try:
        await connection.set_type_codec("jsonb", schema="pg_catalog", encoder=json.dumps, decoder=json.loads)
        yield connection
    finally:
        await connection.close()

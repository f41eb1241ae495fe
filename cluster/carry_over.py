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
from serve_app.audit.events import AuditEvent, account_event
from serve_app.audit.rows import (
    CARE_ASSIGNMENTS,
    CLOSED_RECORDS,
    EMERGENCY_ACCESSES,
    HOOK_IDENTITIES,
    LEGAL_HOLDS,
    REVOCATIONS,
    AuditedTable,
    vouch,
)
from serve_app.records.audit_log import record_event
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

#: The statements, in order, with the action that each change is recorded as, and its table; these from any database ...
_ALWAYS = {"revoke": ("revoke", REVOCATIONS), "hold": ("hold_set", LEGAL_HOLDS)}
#: ... and these from one that goes on from the backup.
_FROM_A_SUCCESSOR = {
    "withdraw_care": ("end_assignment", CARE_ASSIGNMENTS),
    "end_care": ("end_assignment", CARE_ASSIGNMENTS),
    "end_emergency": ("end_emergency", EMERGENCY_ACCESSES),
    "reopen": ("record_reopen", CLOSED_RECORDS),
    "close_later": ("record_close", CLOSED_RECORDS),
    "unmap": ("hook_unmap", HOOK_IDENTITIES),
}


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
        rows = await connection.fetchval(_SQL["read"])
        if await connection.fetchval(
            _SQL["has_table"], HOOK_IDENTITIES.name
        ):  # it may be of before there was one
            rows = await connection.fetchval(_SQL["read_identities"], rows)
        return Replaced(rows, follows)


async def carry_over(
    at: Mapping[str, str], replaced: Replaced | None, detail: Mapping[str, object]
) -> tuple[int, str | None]:
    """Carry it over and record the restore (`detail`), in one transaction; returns how many changes, and what is in doubt.

    In doubt is what was done since the backup, and None is as it should be.
    """
    changes: dict[str, tuple[str, AuditedTable]] = {}
    doubt: str | None = "the database that it replaced could not be read"
    if replaced is not None:
        changes, doubt = _ALWAYS, "the database that it replaced does not go on from the backup"
        if replaced.follows:
            changes, doubt = _ALWAYS | _FROM_A_SUCCESSOR, None
    carried = 0
    async with _connected(at) as connection, connection.transaction():
        for statement, (action, table) in changes.items():
            if not await connection.fetchval(_SQL["has_table"], table.name):
                continue  # the backup is of before there was one, and has nothing to take away
            for row in await connection.fetch(_SQL[statement], replaced.rows if replaced else None):
                await record_event(connection, vouch(_event(action, row), table, [row]))
                carried += 1
        await record_event(
            connection, account_event("restore", {**detail, "carried": carried, "doubt": doubt})
        )
    return carried, doubt


def _event(action: str, row: asyncpg.Record) -> AuditEvent:
    """Say what was changed, as whoever does it by a command would, and that it was carried over."""
    detail: dict[str, object] = {"carried_over": True}
    match action:
        case "revoke":
            detail[row["kind"]] = row["value"]
        case "end_assignment":
            detail["subject"] = row["clinician"]
        case "hold_set":
            detail["hold_id"] = str(row["hold_id"])
        case "end_emergency":
            detail["emergency_id"] = str(row["emergency_id"])
        case "hook_unmap":
            detail |= {"client": row["client"], row["kind"]: row["fhir_id"]}
    ids = {name: row.get(name) for name in ("patient_id", "lesion_id", "image_id")}
    return account_event(action, detail, **ids | {"patient_id": row.get("of_patient", ids["patient_id"])})


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

"""The clinical database as commands need it, and `derm-cds migrate`."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from asyncpg import UndefinedColumnError, UndefinedTableError

from cluster.node_files import application_role, database
from serve_app.audit.events import AuditOutcome, account_event
from serve_app.records.lesions import LesionStore
from serve_app.records.migrate import SchemaMismatch, migrate
from serve_app.records.pool import Pool, open_pool

Result = TypeVar("Result")


def ask(home: Path, question: Callable[[Pool], Awaitable[Result]]) -> Result:
    """Ask the node's database, as the role that serves."""
    with database(home) as urls:
        return ask_database(urls.app, question)


def ask_as_owner(home: Path, question: Callable[[Pool], Awaitable[Result]]) -> Result:
    """Ask the node's database, as the schema's owner."""
    with database(home) as urls:
        return ask_database(urls.owner, question)


def ask_database(url: str, question: Callable[[Pool], Awaitable[Result]]) -> Result:
    """Ask any database. SchemaMismatch where it lacks what this version asks for."""

    async def run() -> Result:
        pool = await open_pool(url, minimum=0, maximum=1, timeout_s=60)
        try:
            return await question(pool)
        except (UndefinedColumnError, UndefinedTableError) as error:
            lacks = error.args[0]
            raise SchemaMismatch(
                f"The database is of another version ({lacks}): `derm-cds migrate` first."
            ) from error
        finally:
            await pool.close()

    return asyncio.run(run())


def record(home: Path, action: str, detail: dict[str, object], *, outcome: AuditOutcome = "success") -> None:
    """Have it in the audit log that this account of the machine does something."""
    event = account_event(action, detail, outcome=outcome)
    ask(home, lambda pool: LesionStore(pool).record_event(event))


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `migrate`."""
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace) -> None:
    with database(arguments.home, new=True) as urls:
        applied = asyncio.run(migrate(urls.owner, application_role=application_role(urls)))
    print("\n".join(f"applied {name}" for name in applied) or "up to date")

"""`derm-cds migrate`: the clinical database's schema."""

from __future__ import annotations

import argparse
import asyncio
import sys

from cluster.database import application_role, database
from serve_app.records.migrate import migrate


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `migrate`."""
    parser.set_defaults(run=_migrate)


def _migrate(arguments: argparse.Namespace) -> int:
    with database(arguments.home) as urls:
        applied = asyncio.run(migrate(urls.owner, application_role=application_role(urls)))
    sys.stdout.write("".join(f"applied {name}\n" for name in applied) or "up to date\n")
    return 0

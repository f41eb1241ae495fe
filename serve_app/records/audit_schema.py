"""Whether the tables, triggers, functions and rights that keep the audit log are those that the migrations made.

The pins are beside this file: `scripts/pin-audit-schema` writes them anew after a migration that changes any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import asyncpg

from serve_app.audit.chain import Tampering
from serve_app.records.pool import border, queries

PINS = Path(__file__).with_suffix(".txt")

_SQL = queries("audit_schema")
_OF_APPLICATION = " to the application"


async def read_schema(connection: asyncpg.Connection, *, application_role: str | None) -> dict[str, str]:
    """Read each object of the schema that matters to the audit log, and its definition; of a function its SHA-256.

    The connection is the owner's; `application_role` is the role that serves, None where that is the owner.
    """
    async with connection.transaction():
        # Only PostgreSQL's own functions, operators and tables answer: none of the same name in another schema.
        await connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
        rows = await connection.fetch(_SQL["audit_schema"], application_role)
    schema: dict[str, str] = {}
    for name, definition in rows:
        function = name.startswith("function ")
        said = (
            f"SHA-256 {sha256(definition.encode()).hexdigest()}" if function else " ".join(definition.split())
        )
        schema[name] = f"{schema[name]}; {said}" if name in schema else said
    return schema


def pins() -> dict[str, str]:
    """The schema as it is pinned."""
    return dict(line.split("\t") for line in PINS.read_text().splitlines())


def pin(schema: Mapping[str, str]) -> None:
    """Pin a schema: object and definition a line, with a tab between them."""
    PINS.write_text("".join(f"{name}\t{schema[name]}\n" for name in sorted(schema)))


def differences(schema: Mapping[str, str], wanted: Mapping[str, str]) -> list[Tampering]:
    """Name every object that is not as it is `wanted`: changed, gone, or added."""
    return [
        Tampering(
            "the audit log's schema is not as it was made",
            about=f"{name}: {schema.get(name, 'not there')} (made as: {wanted.get(name, 'nothing')})",
        )
        for name in sorted(schema.keys() | wanted.keys())
        if schema.get(name) != wanted.get(name)
    ]


async def schema_findings(owner_dsn: str, *, application_role: str | None) -> list[Tampering]:
    """Hold a database's schema against the pins; RecordsUnavailable when it is not reached."""
    with border():
        connection = await asyncpg.connect(owner_dsn, timeout=10, command_timeout=60)
        try:
            schema = await read_schema(connection, application_role=application_role)
        finally:
            await connection.close()
    wanted = pins()
    if application_role is None:  # the owner needs no grants
        wanted = {name: made for name, made in wanted.items() if not name.endswith(_OF_APPLICATION)}
    return differences(schema, wanted)

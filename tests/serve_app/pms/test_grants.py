"""The serving role sends messages and reads patients; it rewrites neither."""

from __future__ import annotations

import asyncpg
import pytest


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM outbox",
        "UPDATE outbox SET encounter_id = 'another'",
        "UPDATE outbox SET message_id = assessment_id",
        "INSERT INTO patient_records (patient_id) VALUES ('p')",
        "UPDATE patient_encounters SET patient_id = 'another'",
    ],
)
async def test_the_application_may_not(database, statement: str) -> None:
    connection = await asyncpg.connect(database.app)
    try:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)
    finally:
        await connection.close()

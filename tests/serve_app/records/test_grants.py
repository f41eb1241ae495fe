"""The serving role can do what serving needs, and nothing more."""

from __future__ import annotations

import asyncpg
import pytest


@pytest.fixture
async def connections(database, lesions, event):
    await lesions.record_event(event())
    app, owner = await asyncpg.connect(database.app), await asyncpg.connect(database.owner)
    yield app, owner
    await app.close()
    await owner.close()


CHANGES = ["UPDATE audit_events SET actor = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events CASCADE"]


@pytest.mark.parametrize("statement", CHANGES)
async def test_the_audit_log_is_append_only_for_all(connections, statement: str) -> None:
    for connection in connections:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM lesion_images",
        "UPDATE audit_seals SET position = 99",
        "DELETE FROM audit_seals",
        "UPDATE lesion_images SET sealed = ''",
        "DELETE FROM assessments",
        "UPDATE lesion_images SET sealed = NULL, erased_at = now()",
        "INSERT INTO erasures SELECT FROM lesions",
        "DELETE FROM erasures",
        "DELETE FROM erasure_receipts",
        "DELETE FROM lesion_embeddings",
        "DELETE FROM legal_holds",
        "INSERT INTO legal_holds SELECT FROM lesions",
        "DELETE FROM closed_records",
        "DELETE FROM condemned_data_keys",
        "DELETE FROM key_stores",
        "UPDATE key_stores SET store_id = gen_random_uuid()",
        "INSERT INTO care_assignments VALUES ('p', 'me', now(), NULL)",
        "UPDATE serving SET model_id = 'mine'",
        "UPDATE idempotency_keys SET key = 'x'",
        "DELETE FROM reference_embeddings",
        "DELETE FROM outbox",
        "UPDATE outbox SET encounter_id = 'another'",
        "UPDATE outbox SET message_id = assessment_id",
        "INSERT INTO patient_records (patient_id) VALUES ('p')",
        "UPDATE patient_encounters SET patient_id = 'another'",
        "UPDATE schema_migrations SET sha256 = ''",
        "CREATE TABLE mine (n int)",
        "CREATE TEMPORARY TABLE mine (n int)",
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "SET session_replication_role = replica",
        "SET ROLE derm_owner",
    ],
)
async def test_the_application_may_not(connections, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connections[0].execute(statement)


async def test_every_table_is_granted_on_purpose(connections) -> None:
    rows = await connections[1].fetch(
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        " AND NOT has_table_privilege('derm_app', oid, 'SELECT')"
    )
    assert rows == []

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


# ruff: noqa: S608 - our own statements
_EVENT, _WENT_IN = (
    "action, actor, outcome, request_id, detail",
    "emergency_id, patient_id, principal, reason, ends_at",
)
_EVENT_VALUES = "'read', 'x', 'success', 'r', '{}'"
_WENT_IN_VALUES = "gen_random_uuid(), 'p', 'x', 'long enough', now()"
_FAR = "9000000000000000000"
#: What the database gives itself (numbers, times), and what comes later: an event numbered far ahead was the last one sealed.
NOT_TO_BE_CHOSEN = {
    f"audit_events (event_id, {_EVENT}) OVERRIDING SYSTEM VALUE": f"{_FAR}, {_EVENT_VALUES}",
    f"audit_events (recorded_at, {_EVENT})": f"now(), {_EVENT_VALUES}",
    "audit_seals (position, event_id, hash, sealed_at)": "2, 1, sha256(''), now()",
    "outbox (position, message_id) OVERRIDING SYSTEM VALUE": "-1, gen_random_uuid()",
    "outbox (message_id, delivered_at)": "gen_random_uuid(), now()",
    f"emergency_accesses (starts_at, {_WENT_IN})": f"'2020-01-01', {_WENT_IN_VALUES}",
    f"emergency_accesses (reviewer, {_WENT_IN})": f"'y', {_WENT_IN_VALUES}",
    "condemned_data_keys": "gen_random_uuid(), '2020-01-01'",
    "key_stores (store_id, claimed_at)": "gen_random_uuid(), '2020-01-01'",
    "lesion_images (image_id, erased_at)": "gen_random_uuid(), now()",
    "assessments (assessment_id, demand_answered_at)": "gen_random_uuid(), now()",
    "hook_feedback (feedback_id, recorded_at)": "gen_random_uuid(), now()",
    "hook_tokens (client, jti_sha256, seen_at)": "'c', sha256(''), now()",
    "reviews (review_id, decision)": "gen_random_uuid(), 'accept'",
    "reviews (review_id, answers)": "gen_random_uuid(), '{}'",
    "lesion_links (link_id)": "gen_random_uuid()",
    "lesion_outcomes (outcome_id, recorded_at)": "gen_random_uuid(), '2020-01-01'",
}
NOT_TO_BE_CHANGED = [
    f"SELECT setval('audit_events_event_id_seq', {_FAR})",
    "SELECT nextval('audit_events_event_id_seq')",
    f"SELECT setval('outbox_position_seq', {_FAR})",
    "UPDATE assessments SET demand_answered_at = now()",
    "UPDATE assessments SET context = '{}'",
    "UPDATE reviews SET note = NULL",
    "DELETE FROM reviews",
    "UPDATE lesion_outcomes SET malignant = false",
    "DELETE FROM lesion_outcomes",
    "UPDATE lesion_links SET ended_at = now()",
    "DELETE FROM lesion_links",
    "UPDATE assessments SET actor = 'x'",
    "UPDATE assessments SET image_id = gen_random_uuid()",
]


@pytest.mark.parametrize(
    "statement",
    [
        *(f"INSERT INTO {into} VALUES ({values})" for into, values in NOT_TO_BE_CHOSEN.items()),
        *NOT_TO_BE_CHANGED,
    ],
)
async def test_the_application_chooses_no_number_time_or_later_state(connections, statement: str) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await connections[0].execute(statement)


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
        "INSERT INTO hook_identities VALUES ('c', 'user', 'Practitioner/1', 'me', now(), 'me')",
        "UPDATE hook_identities SET own_id = 'me'",
        "UPDATE hook_cards SET assessment_id = gen_random_uuid()",
        "DELETE FROM hook_cards",
        "DELETE FROM hook_feedback",
        "UPDATE hook_tokens SET client = 'x'",
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

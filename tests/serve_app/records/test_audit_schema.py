"""What decides who may change the audit log, and what is read of it, is as the migrations made it, or is named."""

from __future__ import annotations

import asyncpg
import pytest

from serve_app.audit.chain import describe
from serve_app.records.audit_schema import differences, pins, read_schema, schema_findings

_REPLACED = """
CREATE OR REPLACE FUNCTION {} LANGUAGE plpgsql AS $$ BEGIN RETURN {}; END $$
"""
CHANGES = {
    "trigger disabled": ("ALTER TABLE audit_events DISABLE TRIGGER audit_events_append_only", "enabled D"),
    "triggers disabled": ("ALTER TABLE audit_seals DISABLE TRIGGER ALL", "RI_FKey_check_ins: enabled D"),
    "trigger dropped": ("DROP TRIGGER audit_seals_append_only ON audit_seals", "append_only: not there"),
    "trigger added": (
        "CREATE TRIGGER more BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        "trigger audit_events.more: enabled O, CREATE TRIGGER more BEFORE INSERT",
    ),
    "function replaced": (
        _REPLACED.format("refuse_audit_change() RETURNS trigger", "NULL"),
        "refuse_audit_change(): SHA",
    ),
    "function's owner": (
        "ALTER FUNCTION refuse_seal_change() OWNER TO derm_superuser",
        "refuse_seal_change(): SHA",
    ),
    "function added": (
        _REPLACED.format("edit(e audit_events) RETURNS bytea SECURITY DEFINER", "NULL"),
        "function edit(e public.audit_events): SHA",
    ),
    "function of the definer": (
        "ALTER FUNCTION erase_image SET search_path = evil, public",
        "function erase_image(",
    ),
    "right to change": (
        "GRANT UPDATE (actor) ON audit_events TO derm_app",
        "UPDATE on column audit_events.actor to the",
    ),
    "right of another": (
        "GRANT INSERT ON audit_seals TO PUBLIC",
        "INSERT on table audit_seals to everybody: made",
    ),
    "right to pass on": ("GRANT INSERT ON audit_seals TO derm_app WITH GRANT OPTION", "made, and may grant"),
    "right to erase": ("GRANT EXECUTE ON FUNCTION erase_image TO PUBLIC", "EXECUTE on function erase_image("),
    "right to add to the schema": (
        "GRANT CREATE ON SCHEMA public TO derm_app",
        "CREATE on schema public to the app",
    ),
    "owner of the schema": (
        "ALTER SCHEMA public OWNER TO derm_app",
        "schema public: owned by the application",
    ),
    "owner of a table": ("ALTER TABLE audit_events OWNER TO derm_superuser", "owned by role derm_superuser"),
    "column": ("ALTER TABLE audit_events ADD COLUMN more text", "audit_events.more: text (made as: nothing)"),
    "default": (
        "ALTER TABLE audit_events ALTER COLUMN recorded_at SET DEFAULT '2020-01-01'",
        "default '2020-01-01",
    ),
    "constraint": (
        "ALTER TABLE audit_seals DROP CONSTRAINT audit_seals_event_id_fkey",
        "event_id_fkey: not there",
    ),
    "index": ("CREATE INDEX more ON audit_events (actor)", "index more: CREATE INDEX more"),
    "rule": (
        "CREATE RULE none AS ON INSERT TO audit_events DO INSTEAD NOTHING",
        "rule audit_events.none: CREATE RULE",
    ),
    "row security": (
        "ALTER TABLE audit_events ENABLE ROW LEVEL SECURITY; CREATE POLICY few ON audit_events USING (actor <> 'x')",
        "policy audit_events.few",
    ),
    "child": ("CREATE TABLE more () INHERITS (audit_events)", "child of audit_events: public.more"),
    "view": (
        "ALTER TABLE audit_events RENAME TO hidden; CREATE VIEW audit_events AS SELECT * FROM hidden",
        "table audit_events: kind v",
    ),
    "setting": (
        "ALTER ROLE derm_app SET session_replication_role = replica",
        "the application: session_replication_role",
    ),
    "path": ("ALTER DATABASE {} SET search_path = evil, public", "setting of everybody: search_path=evil"),
    "function of PostgreSQL": (
        "CREATE OR REPLACE FUNCTION pg_catalog.pg_get_triggerdef(oid) RETURNS text LANGUAGE sql STABLE AS $$ SELECT 'x' $$",
        "built-in function pg_get_triggerdef(oid): replaced",
    ),
}


@pytest.fixture(scope="module")
async def administrator(database, as_superuser):
    """A superuser's connection."""
    connection = await asyncpg.connect(as_superuser(database))
    yield connection
    await connection.close()


async def test_the_pins_are_what_the_migrations_make(database) -> None:
    """Where this fails after a migration was written, `scripts/pin-audit-schema` pins what it made."""
    assert await schema_findings(database.owner, application_role="derm_app") == []


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
async def test_a_change_is_named(administrator, change: str, said: str) -> None:
    name = await administrator.fetchval("SELECT current_database()")
    undo = administrator.transaction()
    await undo.start()
    try:
        await administrator.execute(change.replace("{}", name))
        await administrator.execute("SET LOCAL ROLE derm_owner")
        schema = await read_schema(administrator, application_role="derm_app")
    finally:
        await undo.rollback()
    found = [describe(finding) for finding in differences(schema, pins())]
    assert any(said in words for words in found), found

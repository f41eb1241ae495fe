"""A restore does not undo what took access away or keeps images from being erased."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from cluster.backups import back_up, restore
from cluster.commands.audit import checkpoint_log, sign
from cluster.safety import copy_findings, prevents_ready
from serve_app.audit.events import account_event
from serve_app.audit.rows import (
    CARE_ASSIGNMENTS,
    CLOSED_RECORDS,
    EMERGENCY_ACCESSES,
    HOOK_IDENTITIES,
    LEGAL_HOLDS,
    REVOCATIONS,
    vouch,
)
from serve_app.records.access import AccessStore, CareAssignment
from serve_app.records.audit_log import record_event
from serve_app.records.erasures import Held, HoldStore
from serve_app.records.hooks import HookStore, Identity
from serve_app.records.retention import RetentionStore
from serve_app.settings import NodeFiles
from tests.cluster.clinic import Clinic

LONG_AGO = datetime(2010, 1, 1, tzinfo=UTC)
TOMORROW = datetime.now(UTC) + timedelta(days=1)
EVENT = account_event("test")


@pytest.fixture(scope="module")
def backup(open_clinic: Clinic, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup in which p-1's images are past their retention, and two clinicians have care, one from tomorrow on."""

    async def before(pool: Any) -> None:
        access = AccessStore(pool)
        for clinician, since in (("dr-ended", LONG_AGO), ("dr-stays", LONG_AGO), ("dr-withdrawn", TOMORROW)):
            await access.assign(CareAssignment("p-1", clinician, since, None), event=EVENT)
        names = {"Practitioner/1": "dr-ended", "Practitioner/2": "dr-ended", "Practitioner/3": "dr-stays"}
        await HookStore(pool).map([Identity("ehr", "user", *name) for name in names.items()])
        await RetentionStore(pool).close("p-1", closed_at=LONG_AGO, actor="ops")
        lasts = timedelta(hours=12)
        await access.break_glass(uuid4(), "p-1", "dr-night", "a reason of the test", lasts=lasts, event=EVENT)

    open_clinic.ask(before)
    open_clinic.ask(lambda pool: record_event(pool, account_event("backup")))
    folder = tmp_path_factory.mktemp("backups") / "tuesday"
    back_up(open_clinic.server, folder)
    return folder


async def change(pool: Any) -> Any:
    """What is done after the backup; returns the hold."""
    access = AccessStore(pool)
    await access.revoke("subject", "dr-stolen", by="ops", event=EVENT)
    await access.end_assignment("p-1", "dr-ended", event=EVENT)
    await access.end_assignment("p-1", "dr-withdrawn", event=EVENT)
    hooks = HookStore(pool)
    for user in ("Practitioner/1", "Practitioner/2"):
        await hooks.unmap("ehr", "user", user)
    await hooks.map([Identity("ehr", "user", "Practitioner/2", "dr-other")])
    await pool.execute("UPDATE emergency_accesses SET ends_at = now()")
    await RetentionStore(pool).reopen("p-1", actor="ops")
    return await HoldStore(pool).set(Held(patient_id="p-1"), reason="case 1", actor="counsel")


async def look(pool: Any) -> dict[str, Any]:
    access = AccessStore(pool)
    return {
        "revoked": any(lock.value == "dr-stolen" for lock in await access.revocations()),
        "care": [care.clinician for care in await access.assignments(patient_id="p-1")],
        "expired": len(await RetentionStore(pool).expired(days=365, limit=100)),
        "emergencies": await pool.fetchval("SELECT count(*) FROM emergency_accesses WHERE ends_at > now()"),
        "mapped": [each.fhir_id for each in await HookStore(pool).identities()],
        "holds": [hold.hold_id for hold in await HoldStore(pool).find()],
    }


async def undo(pool: Any) -> None:
    """On record, as whatever is done is: other tests verify the same database."""
    release = "UPDATE legal_holds SET released_at = now(), released_by = 'test' WHERE released_at IS NULL RETURNING *"
    for table, statement in {
        LEGAL_HOLDS: release,
        CLOSED_RECORDS: "DELETE FROM closed_records RETURNING *, true AS gone",
        CARE_ASSIGNMENTS: "DELETE FROM care_assignments RETURNING *, true AS gone",
        REVOCATIONS: "DELETE FROM revocations RETURNING *, true AS gone",
        HOOK_IDENTITIES: "DELETE FROM hook_identities RETURNING *, true AS gone",
        EMERGENCY_ACCESSES: "DELETE FROM emergency_accesses RETURNING *, true AS gone",
    }.items():
        await record_event(pool, vouch(EVENT, table, await pool.fetch(statement)))


def test_what_takes_away_or_keeps_is_carried_over(clinic: Clinic, derm_cds, backup: Path) -> None:
    hold = clinic.ask(change)
    try:
        clinic.server.stop(mode="immediate")  # it recovers from a crash, too
        restored = derm_cds("restore", str(backup), home=clinic.home)
        assert restored.code == 0, restored.err
        found = clinic.ask(look)
        assert found == {
            "revoked": True,
            "care": ["dr-stays"],
            "expired": 0,
            "emergencies": 0,
            "mapped": ["Practitioner/3"],
            "holds": [hold],
        }
        assert "carried over from what it replaced: 8 changes" in restored.out
        assert not NodeFiles(clinic.home).retention_paused.exists()
        query = (
            "SELECT action, patient_id, detail ->> 'subject' AS subject FROM audit_events"
            " WHERE detail @> '{\"carried_over\": true}' ORDER BY event_id DESC LIMIT 8"
        )
        events = {tuple(row) for row in clinic.ask(lambda pool: pool.fetch(query))}
        assert events == {
            ("revoke", None, "dr-stolen"),
            ("end_assignment", "p-1", "dr-ended"),
            ("end_assignment", "p-1", "dr-withdrawn"),
            ("end_emergency", "p-1", None),
            ("record_reopen", "p-1", None),
            ("hold_set", "p-1", None),
            ("hook_unmap", None, None),
        }
        assert derm_cds("audit", "verify", home=clinic.home).code == 0
    finally:
        clinic.ask(undo)


def test_where_it_cannot_be_read_or_does_not_follow_retention_waits(clinic: Clinic, backup: Path) -> None:
    paused = NodeFiles(clinic.home).retention_paused
    clinic.ask(lambda pool: AccessStore(pool).revoke("subject", "dr-stolen", by="ops", event=EVENT))
    # Not what the backup was made of: that a record is not closed here says nothing, a revocation does.
    clinic.as_superuser(
        "ALTER TABLE audit_events DISABLE TRIGGER ALL",
        "UPDATE audit_events SET request_id = 'another' WHERE action = 'backup'",
    )
    clinic.server.stop()
    try:
        done = restore(clinic.server, backup, clinic.public_key)
        assert (done.carried, done.doubt) == (
            1,
            "the database that it replaced does not go on from the backup",
        )
        found = clinic.ask(look)
        assert found["revoked"]
        assert set(found["care"]) == {"dr-ended", "dr-stays", "dr-withdrawn"}
        assert found["expired"] > 0
        assert "does not go on" in paused.read_text()
        (finding,) = [finding for finding in copy_findings(clinic.home) if finding.name == "retention_paused"]
        assert prevents_ready(finding, env="development")
        paused.unlink()

        clinic.server.stop()
        (clinic.server.data / "global" / "pg_control").unlink()
        done = restore(clinic.server, backup, clinic.public_key)
        assert (done.carried, done.doubt) == (0, "the database that it replaced could not be read")
        assert "could not be read" in paused.read_text()
    finally:
        paused.unlink(missing_ok=True)
        clinic.ask(undo)
        clinic.ask(lambda pool: sign(pool, checkpoint_log(clinic.home), restored=True))

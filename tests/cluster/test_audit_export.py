"""`derm-cds audit export`: the log as FHIR, on record itself."""

from __future__ import annotations

import asyncio
import json
import stat
from uuid import uuid4

from serve_app.access.rules import RequestedAction, begin
from serve_app.access.tokens import Principal
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool


def test_the_export_has_every_event_of_the_time_and_is_one_itself(derm_cds, home, tmp_path) -> None:
    derm_cds("migrate", home=home)
    span = ("--from", "2020-01-01T00:00:00Z", "--to", "2099-01-01T00:00:00Z")
    first, again = tmp_path / "first.ndjson", tmp_path / "again.ndjson"
    for path in (first, again):
        said = derm_cds("audit", "export", *span, "--out", str(path), home=home)
        assert said.code == 0, said.err
    before, after = (path.read_text().splitlines() for path in (first, again))
    assert len(after) == len(before) + 1
    assert after[: len(before)] == before
    own = json.loads(after[-1])
    assert (own["resourceType"], own["type"]["code"]) == ("AuditEvent", "110106")
    assert own["subtype"][-1]["code"] == "export"
    assert f"{len(after)} events" in said.out
    assert stat.S_IMODE(first.stat().st_mode) == 0o600


async def _read_in_an_emergency(dsn: str, request_id: str) -> None:
    """Record a read as a request does, once without and once on an emergency access."""
    pool = await open_pool(dsn, minimum=0, maximum=1)
    try:
        for emergency in (None, uuid4()):
            attempt = RequestedAction(
                Principal("dr", frozenset({"clinician"})), "read", request_id, patient_id="p-1"
            )
            attempt.emergency = emergency
            begin(attempt)
            await LesionStore(pool).record_event(attempt.event("success"))
    finally:
        await pool.close()


def test_an_emergency_is_exported_as_emergency_treatment(derm_cds, home, urls, tmp_path) -> None:
    derm_cds("migrate", home=home)
    request_id = str(uuid4())
    asyncio.run(_read_in_an_emergency(urls.app, request_id))
    path = tmp_path / "out.ndjson"
    said = derm_cds(
        "audit", "export", "--from", "2020-01-01", "--to", "2099-01-01", "--out", str(path), home=home
    )
    assert said.code == 0, said.err
    lines = [line for line in path.read_text().splitlines() if request_id in line]
    purposes = [json.loads(line)["purposeOfEvent"][0]["coding"][0]["code"] for line in lines]
    assert purposes == ["TREAT", "ETREAT"]


def test_an_event_from_before_there_was_a_purpose_verifies_and_is_exported_without(
    derm_cds, home, urls, tmp_path
) -> None:
    derm_cds("migrate", home=home)
    request_id = str(uuid4())

    async def record_as_before() -> None:
        pool = await open_pool(urls.app, minimum=0, maximum=1)
        try:
            await pool.execute(
                "INSERT INTO audit_events (action, actor, outcome, patient_id, request_id, detail)"
                " VALUES ('read', 'dr', 'success', 'p-1', $1, '{}')",
                request_id,
            )
        finally:
            await pool.close()

    asyncio.run(record_as_before())
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    assert derm_cds("audit", "verify", home=home).code == 0
    path = tmp_path / "out.ndjson"
    span = ("--from", "2020-01-01", "--to", "2099-01-01")
    assert derm_cds("audit", "export", *span, "--out", str(path), home=home).code == 0
    (old,) = (json.loads(line) for line in path.read_text().splitlines() if request_id in line)
    assert "purposeOfEvent" not in old
    own = json.loads(path.read_text().splitlines()[-1])
    assert own["purposeOfEvent"][0]["coding"][0]["code"] == "HCOMPL"


def test_a_file_is_never_written_over(derm_cds, home, tmp_path) -> None:
    derm_cds("migrate", home=home)
    path = tmp_path / "there"
    path.write_text("kept")
    span = ("--from", "2026-01-01", "--to", "2026-01-02")
    said = derm_cds("audit", "export", *span, "--out", str(path), home=home)
    assert said.code == 1
    assert path.read_text() == "kept"


def test_an_empty_span_is_refused(derm_cds, home, tmp_path) -> None:
    said = derm_cds(
        "audit",
        "export",
        "--from",
        "2026-01-02",
        "--to",
        "2026-01-01",
        "--out",
        str(tmp_path / "x"),
        home=home,
    )
    assert said.code == 1
    assert "--from must be before --to" in said.err

"""`derm-cds outbox` and `patients` against a real database."""

from __future__ import annotations

import json
from uuid import uuid4

from serve_app.audit.events import os_account
from tests.cluster.conftest import Said

_MESSAGE = """
INSERT INTO outbox (message_id, assessment_id, encounter_id, last_error, dead_at)
VALUES (gen_random_uuid(), $1, 'e-1', 'http_500', CASE WHEN $2 THEN now() END) RETURNING message_id
"""


def test_the_outbox_is_shown_and_its_dead_letters_are_sent_again(derm_cds, own_home, sql, add_image) -> None:
    assert derm_cds("outbox", "status", home=own_home).out == "0 wait; 0 dead\n"
    assert derm_cds("outbox", "list", home=own_home).out == "nothing\n"
    waiting, dead = (
        sql(_MESSAGE, add_image(uuid4(), uuid4(), b"x"), is_dead)[0]["message_id"]
        for is_dead in (False, True)
    )
    status = derm_cds("outbox", "status", home=own_home)
    assert status.code == 1
    assert status.out.startswith("1 wait, the oldest for ")
    assert status.out.endswith("; 1 dead\n")
    listed = derm_cds("outbox", "list", home=own_home).out
    assert str(waiting) in listed
    assert "last error http_500" in listed
    assert derm_cds("outbox", "list", "--dead", home=own_home).out.startswith(f"{dead} encounter e-1")
    unknown = derm_cds("outbox", "retry", str(uuid4()), home=own_home)
    assert unknown.code == 1
    assert "derm-cds outbox list" in unknown.err
    assert derm_cds("outbox", "retry", "--dead", home=own_home).out == "1 will be sent at once\n"
    assert derm_cds("outbox", "retry", str(waiting), home=own_home).out == "1 will be sent at once\n"
    assert derm_cds("outbox", "status", home=own_home).code == 0
    events = sql("SELECT actor, detail FROM audit_events WHERE action = 'outbox_retry' ORDER BY event_id")
    assert [row["detail"]["message_id"] for row in events] == [str(dead), str(waiting)]
    assert {row["actor"] for row in events} == {os_account()}


def test_patients_are_loaded_whole_or_not_at_all_each_an_event_without_what_was_written(
    derm_cds, own_home, sql
) -> None:
    file = own_home / "patients.jsonl"

    def load(*patients: dict) -> Said:
        file.write_text("".join(json.dumps(patient) + "\n" for patient in patients))
        return derm_cds("patients", "load", str(file), home=own_home)

    first = {"patient_id": "p-1", "birth_date": "1961-04-02", "sex": "female", "encounters": ["e-1", "e-2"]}
    second = {"patient_id": "p-2", "history": {"personal_melanoma": True}}
    failed = load(first, {"patient_id": "p-2", "sex": "f"})
    assert (failed.code, "line 2" in failed.err, "1961" in failed.err) == (1, True, False)
    assert sql("SELECT * FROM patient_records") == []
    for _ in range(2):
        assert load(first, second).out == "2 patients loaded\n"
    (row,) = sql("SELECT patient_id FROM patient_encounters WHERE encounter_id = 'e-1'")
    assert row["patient_id"] == "p-1"
    rows = sql("SELECT * FROM audit_events WHERE action = 'patient_load' ORDER BY event_id")
    assert [(row["patient_id"], row["detail"]["encounters"]) for row in rows] == [("p-1", 2), ("p-2", 0)] * 2
    assert {row["actor"] for row in rows} == {os_account()}
    written = json.dumps([row["detail"] for row in rows])
    assert not any(private in written for private in ("1961", "female", "melanoma", "e-1"))
    # What cannot be audited is not written, for any of them.
    sql("ALTER TABLE audit_events ADD CONSTRAINT no_p2 CHECK (patient_id <> 'p-2') NOT VALID")
    sql("DELETE FROM patient_records")
    assert load(first, second).code == 1
    assert sql("SELECT * FROM patient_records") == []

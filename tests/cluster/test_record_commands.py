"""`derm-cds audit`, `hold`, `retention`, `keys`, `outbox` and `patients` against a real database and key store.

What Vault and KMS answer is in tests/serve_app/keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
import json
import os
from pathlib import Path
import re
import sqlite3
import subprocess
from uuid import UUID, uuid4

import pytest

from cluster.postgres import DatabaseUrls, programs
from serve_app.audit.events import os_account
from serve_app.domain.errors import DataKeyMissing
from serve_app.erasure.sweeping import pause, read_pause
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.settings import NodeFiles
from tests.cluster.conftest import Said
from tests.serve_app.records.test_audit_chain import ASK_THE_SUSPECT

BINDING = ImageBinding(UUID(int=1), "patient-1", "image/jpeg")
_MESSAGE = """
INSERT INTO outbox (message_id, assessment_id, encounter_id, last_error, dead_at)
VALUES (gen_random_uuid(), $1, 'e-1', 'http_500', CASE WHEN $2 THEN now() END) RETURNING message_id
"""


@pytest.fixture
def home(own_home: Path) -> Path:
    """With what the first start makes, and no command does."""
    files = NodeFiles(own_home)
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    return own_home


@contextmanager
def open_keys(home: Path) -> Iterator[KeyStore]:
    files = NodeFiles(home)
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        yield keys


def test_the_audit_log_verifies_and_what_is_forged_hidden_or_gone_is_found(
    derm_cds, home, sql, tmp_path: Path
) -> None:
    checkpoints = home / "audit" / "checkpoints.jsonl"
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    elsewhere = ("--checkpoints", str(copy), "--public-key", str(key))

    def verify(*options: str, code: int, said: str) -> None:
        verified = derm_cds("audit", "verify", *options, home=home)
        assert (verified.code, said in verified.out + verified.err) == (code, True), verified

    def behind_its_back(table: str, statement: str) -> None:
        for each in (
            f"ALTER TABLE {table} DISABLE TRIGGER USER",
            statement,
            f"ALTER TABLE {table} ENABLE TRIGGER USER",
        ):
            sql(each)

    derm_cds("keys", "rotate", home=home)  # what there is to sign
    copy.write_text(derm_cds("audit", "checkpoint", home=home).out)
    key.write_text(derm_cds("audit", "public-key", home=home).out)
    assert copy.read_bytes() == checkpoints.read_bytes()
    verify(code=0, said="1 checkpoints; ")
    verify(*elsewhere, code=0, said="nothing found")
    assert "as it was signed" in derm_cds("status", home=home).out
    checkpoints.write_text(copy.read_text().replace('"position": ', '"position": 1'))
    verify(code=1, said="is not a checkpoint that was signed here")

    # Taken away: no new ones begin until somebody says that the database was restored.
    checkpoints.unlink()
    behind_its_back("audit_seals", "UPDATE audit_seals SET sealed_at = sealed_at - interval '1 hour'")
    verify(code=1, said="the checkpoints are gone")
    refused = derm_cds("audit", "checkpoint", home=home)
    assert (refused.code, "No checkpoint was signed" in refused.err) == (1, True)
    assert "not what was signed" in derm_cds("status", home=home).out
    assert derm_cds("audit", "checkpoint", "--restored", home=home).code == 0
    assert "restored by other means" in read_pause(NodeFiles(home).retention_paused)  # holds may be forgotten
    verify(code=0, said="holds up to seal 0")

    # Whoever holds the machine writes the log anew, and signs it with a key of their own.
    behind_its_back("audit_events", "UPDATE audit_events SET actor = 'another'")
    behind_its_back("audit_seals", "DELETE FROM audit_seals")
    for path in (checkpoints, home / "keys" / "audit-signing.key"):
        path.unlink()
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    verify(code=0, said="nothing found")
    verify(*elsewhere, code=1, said="is not a checkpoint that was signed here")
    checkpoints.unlink()
    verify(*elsewhere, code=1, said="the chain was written anew: seal")


def test_a_row_changed_beside_the_log_is_named(derm_cds, own_home, sql) -> None:
    for command in (
        ("assign", "--patient", "p-1", "--clinician", "dr"),
        ("access", "revoke", "dr-out"),
        ("hold", "set", "--patient", "p-1", "--reason", "case 1"),
    ):
        assert derm_cds(*command, home=own_home).code == 0
    sound = derm_cds("audit", "verify", home=own_home)
    assert (sound.code, "3 rows beside the log, 0 of them" in sound.out) == (0, True), sound
    sql("DELETE FROM revocations")
    sql("INSERT INTO care_assignments VALUES ('p-1', 'dr-x', '2026-01-01Z')")
    sql("UPDATE legal_holds SET released_at = now(), released_by = 'nobody'")
    found = derm_cds("audit", "verify", home=own_home)
    assert (found.code, "beside the log, 0 of them from before it held digests: 3 found" in found.out) == (
        1,
        True,
    )
    for said in (
        'revocations ["subject", "dr-out"]: is gone (event 2)',
        'care_assignments ["dr-x", "p-1", "2026-01-01T00:00:00.000000+00:00"]: is in no event',
        ": is not what its event says (event 3)",
        "A row beside the audit log is not what was written",
    ):
        assert said in found.err


def test_a_database_of_an_older_version_is_said_to_be_one(derm_cds, own_home, sql) -> None:
    """New code over old data, before the first start; nothing there is called tampering."""
    sql("DROP TABLE site_operating_points")
    sql("ALTER TABLE emergency_accesses DROP COLUMN ended_at CASCADE")
    for command in (("audit", "verify"), ("access", "list")):
        said = derm_cds(*command, home=own_home)
        assert (said.code, said.err.count("\n")) == (1, 1), said
        assert "of another version" in said.err
        assert "`derm-cds migrate` first" in said.err


def test_events_that_wait_for_their_seal_are_said(derm_cds, home, sql) -> None:
    derm_cds("keys", "rotate", home=home)
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    derm_cds("keys", "rotate", home=home)
    assert "as it was signed" in derm_cds("status", home=home).out
    sql("ALTER TABLE audit_events DISABLE TRIGGER USER")
    sql("UPDATE audit_events SET recorded_at = recorded_at - interval '3 minutes' WHERE event_id = 2")
    said = derm_cds("status", home=home).out
    assert "not sealed: 1 events of the audit log, from 2 on" in said, said
    # While no service runs, nothing seals what commands record: that is no harm done.
    sql("ALTER TABLE audit_events ENABLE TRIGGER USER")
    sql("ALTER TABLE audit_seals DISABLE TRIGGER USER")
    sql("UPDATE audit_seals SET sealed_at = sealed_at - interval '3 minutes'")
    sql("ALTER TABLE audit_seals ENABLE TRIGGER USER")
    verified = derm_cds("audit", "verify", home=home)
    assert verified.code == 0, verified.err
    assert "1 events have no seal until the service runs again" in verified.out
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    assert "as it was signed" in derm_cds("status", home=home).out


@pytest.fixture
def copies(derm_cds, home, tmp_path: Path) -> tuple[str, ...]:
    """A log with a checkpoint: that and the key that checks it, as they were kept elsewhere."""
    derm_cds("keys", "rotate", home=home)
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    copy.write_text(derm_cds("audit", "checkpoint", home=home).out)
    key.write_text(derm_cds("audit", "public-key", home=home).out)
    return ("--checkpoints", str(copy), "--public-key", str(key))


def test_an_export_of_the_sealed_log_is_verified_where_there_is_no_database(
    derm_cds, home, copies, tmp_path: Path, monkeypatch
) -> None:
    file, nowhere = tmp_path / "log.ndjson", tmp_path / "nowhere"

    def verify(code: int, said: str) -> None:
        verified = derm_cds("audit", "verify", "--export", str(file), *copies, home=nowhere)
        assert (verified.code, said in verified.out + verified.err) == (code, True), verified
        assert not nowhere.exists()

    exported = derm_cds("audit", "export", "--sealed", "--out", str(file), home=home)
    assert (exported.code, file.stat().st_mode & 0o777) == (0, 0o600), exported
    lines = file.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines]
    assert [event["position"] for event in events] == list(range(1, len(lines) + 1))
    assert events[0]["event"][2] == "key_rotate"
    assert (events[-1]["event"][2], events[-1]["event"][-1]["kind"]) == ("export", "sealed")
    for name in ("DATABASE_URL", "OWNER_DATABASE_URL"):
        monkeypatch.delenv(f"DERM_{name}")
    verify(0, "1 events are behind the last checkpoint")
    verify(0, f"{len(lines)} events, 1 checkpoints; ")
    file.write_text(lines[0].replace(os_account(), "os:another") + "".join(lines[1:]))
    verify(1, "the event or its place has changed: seal 1, event 1")
    file.write_text("".join(lines[1:]))
    verify(1, "seals are missing: seal 2, event 2")
    file.write_text("")
    verify(1, "the log was cut short: seal 1")
    file.write_text(lines[0] + "{}\n")
    verify(1, "line 2, is not of an export")
    alone = derm_cds("audit", "verify", "--export", str(file), home=nowhere)
    assert (alone.code, "need --checkpoints and --public-key" in alone.err) == (1, True)
    both = derm_cds("audit", "export", "--sealed", "--from", "2026-01-01", "--out", str(file), home=home)
    assert (both.code, "or --sealed" in both.err) == (1, True)


def test_a_dump_is_verified_where_it_was_restored(
    derm_cds, home, copies, as_superuser, tmp_path: Path
) -> None:
    """What an administrator did to the database goes into the dump with it, its functions too."""
    urls = DatabaseUrls(owner=os.environ["DERM_OWNER_DATABASE_URL"], app=os.environ["DERM_DATABASE_URL"])
    node, nowhere = as_superuser(urls), tmp_path / "nowhere"

    def run(program: str, url: str, *options: str, sql: str = "") -> str:
        command = [programs() / program, *options, url]
        return subprocess.run(command, input=sql, check=True, capture_output=True, text=True).stdout

    def psql(url: str, sql: str) -> None:
        run("psql", url, "--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", sql=sql)

    def verify(elsewhere: str, code: int, said: str) -> None:
        psql(node, f"CREATE DATABASE {elsewhere}")
        copied = re.sub(r"/derm_\d+\?", f"/{elsewhere}?", node)
        psql(copied, run("pg_dump", node, "--no-owner", "--no-privileges"))
        verified = derm_cds("audit", "verify", "--database", copied, *copies, home=nowhere)
        assert (verified.code, said in verified.out + verified.err) == (code, True), verified
        assert not nowhere.exists()

    verify("derm_untouched", 0, "nothing found")
    edited = ASK_THE_SUSPECT.replace("event_id = 5", "event_id = 1")
    psql(node, f"SET session_replication_role = replica; {edited}")
    verify("derm_edited", 1, "the event or its place has changed: seal 1")


def test_what_was_done_to_the_logs_schema_is_named_by_verify_and_status(derm_cds, home, sql) -> None:
    derm_cds("keys", "rotate", home=home)
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    assert derm_cds("audit", "verify", home=home).code == 0
    sql("ALTER TABLE audit_events DISABLE TRIGGER audit_events_append_only")
    verified, status = derm_cds("audit", "verify", home=home), derm_cds("status", "--json", home=home)
    told = str(json.loads(status.out)["safety"]["audit_schema"])
    for said in (verified.err, told):
        assert (
            "schema is not as it was made: trigger audit_events.audit_events_append_only: enabled D" in said
        )
    assert (verified.code, verified.out.count(": 1 found")) == (1, 1)


@pytest.fixture
def image(home: Path, add_image) -> UUID:
    """One sealed image of patient p-1, of 2020; its data key's id."""
    image_id = uuid4()
    with open_keys(home) as keys:
        key = keys.create()
        sealed = seal(b"image", data_key=key, binding=ImageBinding(image_id, "p-1", "image/png"))
    add_image(image_id, key.id, sealed)
    return image_id


def test_a_closed_record_is_erased_when_its_hold_is_released(derm_cds, home, image, sql) -> None:
    assert derm_cds("retention", "close", "p-1", "--at", "2021-01-01T00:00:00Z", home=home).code == 0
    held = derm_cds("hold", "set", "--image", str(image), "--reason", "case 1", home=home)
    assert held.code == 0, held.err
    hold = held.out.split()[0]
    assert f"{hold} image {image}: case 1" in derm_cds("hold", "list", home=home).out
    said = derm_cds("retention", "run", "--days", "365", "--dry-run", home=home)
    assert (
        said.out == "1 closed records; 1 images are more than 365 days past, 1 of them under a legal hold\n"
    )
    assert "0 images erased" in derm_cds("retention", "run", "--days", "365", "--yes", home=home).out
    assert derm_cds("hold", "release", hold, home=home).code == 0
    again = derm_cds("hold", "release", hold, home=home)
    assert (again.code, "is in force" in again.err) == (1, True)
    assert derm_cds("hold", "list", home=home).out == ""
    assert "released" in derm_cds("hold", "list", "--all", home=home).out
    pause(NodeFiles(home).retention_paused, "a restore")
    waits = derm_cds("retention", "run", "--days", "365", "--yes", home=home)
    assert (waits.code, "`derm-cds retention resume` first" in waits.err) == (1, True)
    assert derm_cds("retention", "resume", home=home).code == 0
    run = derm_cds("retention", "run", "--days", "365", "--yes", home=home)
    assert "1 images erased" in run.out, run.err
    (row,) = sql(
        "SELECT sealed, data_key_id, reason FROM lesion_images JOIN erasures USING (image_id, data_key_id)"
        " JOIN erasure_receipts USING (receipt_id)"
    )
    assert (row["sealed"], row["reason"]) == (None, "retention")
    files = b"".join(file.read_bytes() for file in (home / "keys").glob("keystore.sqlite*"))
    assert b"retention" in files  # what it remembers of the destroyed key
    events = sql("SELECT action FROM audit_events WHERE actor <> 'dr' ORDER BY event_id")
    assert [event["action"] for event in events] == [
        *("record_close", "hold_set", "hold_release", "retention_resume", "erase", "erased")
    ]


def test_nothing_expires_without_a_retention_or_a_closed_record(derm_cds, home, image) -> None:
    unset = derm_cds("retention", "run", "--yes", home=home)
    assert (unset.code, "Nothing expires" in unset.err) == (1, True)
    assert "0 images erased" in derm_cds("retention", "run", "--days", "0", "--yes", home=home).out
    missing = derm_cds("hold", "set", "--lesion", str(uuid4()), "--reason", "case", home=home)
    assert (missing.code, "nothing by that id" in missing.err) == (1, True)


def test_a_key_is_rotated_rewrapped_and_retired_on_record(derm_cds, home, sql) -> None:
    with open_keys(home) as keys:
        sealed = seal(b"image", data_key=keys.create(), binding=BINDING)
    status = derm_cds("keys", "status", home=home).out
    assert "version 1 (current): wraps 1 data keys; 1 of at most" in status
    rotated = derm_cds("keys", "rotate", home=home)
    assert (rotated.code, rotated.out.startswith("version 2 wraps from now on")) == (0, True)
    rewrapped = derm_cds("keys", "rewrap", home=home).out
    assert rewrapped == "1 data keys rewrapped; all are under version 2\n"  # no terminal: no progress
    current = derm_cds("keys", "retire", "2", home=home)
    assert (current.code, "rotate and rewrap first" in current.err) == (1, True)
    assert derm_cds("keys", "retire", "1", home=home).code == 0
    unknown = derm_cds("keys", "retire", "1", home=home)
    assert (unknown.code, unknown.err.count("\n")) == (1, 1)
    with open_keys(home) as keys:
        assert keys.open_image(sealed, BINDING) == b"image"
    assert "version 1 (retired): wraps 0" in derm_cds("keys", "status", home=home).out
    events = sql("SELECT action, outcome FROM audit_events WHERE action LIKE 'key_%' ORDER BY event_id")
    done = [(row["action"].removeprefix("key_"), row["outcome"]) for row in events]
    assert done == [
        ("rotate", "success"),
        ("rewrap", "success"),
        *(("retire", "success"), ("retire", "failed")),  # the current one
        ("retire", "success"),
        *(("retire", "success"), ("retire", "failed")),
    ]


def test_another_keyrings_store_is_not_rotated(derm_cds, home, sql) -> None:
    keyring = NodeFiles(home).keyring
    keyring.unlink()
    FileKeyring.make(keyring)
    before = keyring.read_bytes()
    said = derm_cds("keys", "rotate", home=home)
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert keyring.read_bytes() == before
    assert sql("SELECT * FROM audit_events") == []


def test_keys_without_an_image_are_counted_and_swept_when_told_to(derm_cds, home) -> None:
    with open_keys(home) as keys:
        failed, lost, young = (keys.create().id for _ in range(3))
        keys.stop_awaiting([lost])
    with closing(sqlite3.connect(NodeFiles(home).keystore)) as store, store:
        store.execute(
            "UPDATE data_keys SET created_at = datetime('now', '-2 hours') WHERE data_key_id <> ?",
            (young.bytes,),
        )
    said = derm_cds("keys", "sweep", home=home)
    assert said.code == 0, said.err
    assert "1 data keys of uploads that failed" in said.out
    assert "1 data keys of images that this database has no more" in said.out
    assert "put the newer one back" in said.out
    with open_keys(home) as keys:
        assert keys.load(failed).id == failed
        assert derm_cds("keys", "sweep", "--yes", home=home).out.endswith("2 data keys are destroyed\n")
        assert keys.load(young).id == young
        for key in (failed, lost):
            with pytest.raises(DataKeyMissing):
                keys.load(key)
    assert derm_cds("keys", "sweep", "--yes", home=home).out.endswith("0 data keys are destroyed\n")


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
    sql("UPDATE outbox SET attempts = 1, last_error = 'wrong_encounter'")
    status = derm_cds("outbox", "status", home=own_home).out
    assert status.startswith("1 wait (1 held: their encounter is not confirmed), the oldest for ")
    assert status.endswith("; 1 dead, 1 of them under another patient's encounter\n")
    assert "its encounter not confirmed" in derm_cds("outbox", "list", home=own_home).out
    sql("UPDATE outbox SET last_error = 'http_500'")
    listed = derm_cds("outbox", "list", home=own_home).out
    assert str(waiting) in listed
    assert "last error http_500" in listed
    assert derm_cds("outbox", "list", "--dead", home=own_home).out.startswith(
        f"{dead} assessment, encounter e-1, assessment"
    )
    unknown = derm_cds("outbox", "retry", str(uuid4()), home=own_home)
    assert unknown.code == 1
    assert "derm-cds outbox list" in unknown.err
    assert derm_cds("outbox", "retry", "--dead", home=own_home).out == "1 will be sent at once\n"
    assert derm_cds("outbox", "retry", str(waiting), home=own_home).out == "1 will be sent at once\n"
    assert derm_cds("outbox", "status", home=own_home).code == 0
    sql(
        "INSERT INTO outbox (message_id, kind, subject_id) VALUES ($1, 'report', $2)",
        report := uuid4(),
        uuid4(),
    )
    assert f"{report} report, no encounter: waits" in derm_cds("outbox", "list", home=own_home).out
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

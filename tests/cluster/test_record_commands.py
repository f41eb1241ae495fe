"""`derm-cds keys`, `audit`, `references`, `hold` and `retention` against a real database and key store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from serve_app.audit.events import os_account
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.records.health import INVARIANTS
from serve_app.settings import NodeFiles

_IMAGE = """
WITH lesion AS (
    INSERT INTO lesions VALUES ($1, 'p-1', '2020-01-01'::timestamptz) RETURNING lesion_id
), image AS (
    INSERT INTO lesion_images
        (image_id, lesion_id, patient_id, created_at, content_type, width, height, data_key_id, sealed)
    VALUES ($2, $1, 'p-1', '2020-01-01'::timestamptz, 'image/png', 300, 300, $3, $4) RETURNING image_id
)
INSERT INTO assessments (assessment_id, image_id, created_at, outcome, failure, completed_at, context, top_k, licences,
    actor, request_id)
VALUES ($5, $2, now(), 'failed', 'test', now(), '{}', 10, '{}', 'dr', 'r')
"""


@pytest.fixture
def home(own_home: Path) -> Path:
    """With what the first start makes, and no command does."""
    files = NodeFiles(own_home)
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    return own_home


def test_a_key_is_rotated_rewrapped_and_retired_on_record(derm_cds, home, sql) -> None:
    assert "version 1 (current): wraps 0 data keys; 0 of at most" in derm_cds("keys", "status", home=home).out
    rotated = derm_cds("keys", "rotate", home=home)
    assert rotated.code == 0
    assert rotated.out.startswith("version 2 wraps from now on")
    assert "0 data keys rewrapped; all are under version 2" in derm_cds("keys", "rewrap", home=home).out
    current = derm_cds("keys", "retire", "2", home=home)
    assert current.code == 1
    assert "rotate and rewrap first" in current.err
    assert derm_cds("keys", "retire", "1", home=home).code == 0
    assert "version 1" not in derm_cds("keys", "status", home=home).out
    events = sql("SELECT action, outcome FROM audit_events WHERE action LIKE 'key_%' ORDER BY event_id")
    done = [(row["action"].removeprefix("key_"), row["outcome"]) for row in events]
    assert done == [
        ("rotate", "success"),
        ("rewrap", "success"),
        ("retire", "success"),
        ("retire", "failed"),
        ("retire", "success"),
    ]


def test_a_space_is_loaded_listed_verified_and_dropped_only_when_not_live(
    derm_cds, home, model_id, sql
) -> None:
    assert f"{model_id} answers" in derm_cds("references", "load", home=home).out
    assert "no new references loaded" in derm_cds("references", "load", home=home).out
    assert f"invariants  all {len(INVARIANTS)} hold" in derm_cds("status", home=home).out
    listed = derm_cds("references", "spaces", home=home).out
    assert listed.startswith("* ")
    assert "0 failures; filled by" in listed
    verified = derm_cds("references", "verify", model_id, home=home)
    assert verified.code == 0, verified.out
    assert verified.out.count(" ok  ") == 5
    space = listed.split()[1].rstrip(":")
    dropped = derm_cds("references", "drop", space, home=home)
    assert dropped.code == 1
    assert "live model answers in" in dropped.err
    unknown = derm_cds("references", "drop", "no.space", home=home)
    assert unknown.code == 1
    assert "nothing in a space named" in unknown.err
    events = sql("SELECT action, actor, detail FROM audit_events ORDER BY event_id")
    assert [row["action"] for row in events] == ["references_load", "model_publish"]
    assert {row["actor"] for row in events} == {os_account()}
    assert events[0]["detail"]["embedding_space"] == space


def test_the_audit_log_verifies_and_a_forged_checkpoint_does_not(derm_cds, home) -> None:
    derm_cds("keys", "rotate", home=home)
    signed = derm_cds("audit", "checkpoint", home=home)
    assert signed.code == 0, signed.err
    verified = derm_cds("audit", "verify", home=home)
    assert verified.code == 0, verified.err
    assert "1 checkpoints" in verified.out
    assert "nothing found" in verified.out
    assert "as it was signed" in derm_cds("status", home=home).out
    file = home / "audit" / "checkpoints.jsonl"
    file.write_text(file.read_text().replace('"position": ', '"position": 1'))
    forged = derm_cds("audit", "verify", home=home)
    assert forged.code == 1
    assert "is not a checkpoint that was signed here" in forged.err


def test_a_copy_and_the_public_key_show_what_this_machine_hides(derm_cds, home, sql, tmp_path: Path) -> None:
    derm_cds("keys", "rotate", home=home)
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    copy.write_text(derm_cds("audit", "checkpoint", home=home).out)
    key.write_text(derm_cds("audit", "public-key", home=home).out)
    assert copy.read_bytes() == (home / "audit" / "checkpoints.jsonl").read_bytes()
    elsewhere = ("--checkpoints", str(copy), "--public-key", str(key))
    assert derm_cds("audit", "verify", *elsewhere, home=home).code == 0
    # Whoever holds the machine writes the log anew, and signs it with a key of their own.
    sql("ALTER TABLE audit_seals DISABLE TRIGGER USER")
    sql("ALTER TABLE audit_events DISABLE TRIGGER USER")
    sql("UPDATE audit_events SET actor = 'another'")
    sql("DELETE FROM audit_seals")
    for path in ("audit/checkpoints.jsonl", "keys/audit-signing.key"):
        (home / path).unlink()
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    assert derm_cds("audit", "verify", home=home).code == 0
    other_key = derm_cds("audit", "verify", *elsewhere, home=home)
    assert other_key.code == 1
    assert "is not a checkpoint that was signed here" in other_key.err
    (home / "audit" / "checkpoints.jsonl").unlink()
    rewritten = derm_cds("audit", "verify", *elsewhere, home=home)
    assert rewritten.code == 1
    assert "the chain was written anew: seal" in rewritten.err


def test_checkpoints_that_are_gone_are_found_and_not_begun_anew(derm_cds, home, sql) -> None:
    derm_cds("keys", "rotate", home=home)
    derm_cds("audit", "checkpoint", home=home)
    (home / "audit" / "checkpoints.jsonl").unlink()
    sql("ALTER TABLE audit_seals DISABLE TRIGGER USER")
    sql("UPDATE audit_seals SET sealed_at = sealed_at - interval '1 hour'")
    found = derm_cds("audit", "verify", home=home)
    assert found.code == 1
    assert "the checkpoints are gone" in found.err
    refused = derm_cds("audit", "checkpoint", home=home)
    assert refused.code == 1
    assert "No checkpoint was signed" in refused.err
    assert "not what was signed" in derm_cds("status", home=home).out
    assert derm_cds("audit", "checkpoint", "--restored", home=home).code == 0
    verified = derm_cds("audit", "verify", home=home)
    assert verified.code == 0, verified.err
    assert "holds up to seal 0" in verified.out


@pytest.fixture
def image(home: Path, sql) -> UUID:
    """One sealed image of patient p-1, of 2020; its data key's id."""
    files, image_id = NodeFiles(home), uuid4()
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
        key = keys.create()
        sealed = seal(b"image", data_key=key, binding=ImageBinding(image_id, "p-1", "image/png"))
    sql(_IMAGE, uuid4(), image_id, key.id, sealed, uuid4())
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
    run = derm_cds("retention", "run", "--days", "365", "--yes", home=home)
    assert "1 images erased" in run.out, run.err
    (row,) = sql(
        "SELECT sealed, data_key_id, reason FROM lesion_images JOIN erasures USING (image_id, data_key_id)"
        " JOIN erasure_receipts USING (receipt_id)"
    )
    assert (row["sealed"], row["reason"]) == (None, "retention")
    files = b"".join(file.read_bytes() for file in (home / "keys").glob("keystore.sqlite*"))
    assert b"retention" in files  # what it remembers of the destroyed key
    events = sql("SELECT action FROM audit_events ORDER BY event_id")
    assert [event["action"] for event in events] == [
        *("record_close", "hold_set", "hold_release", "erase", "erased")
    ]


def test_nothing_expires_without_a_retention_or_a_closed_record(derm_cds, home, image) -> None:
    unset = derm_cds("retention", "run", "--yes", home=home)
    assert (unset.code, "Nothing expires" in unset.err) == (1, True)
    assert "0 images erased" in derm_cds("retention", "run", "--days", "0", "--yes", home=home).out
    missing = derm_cds("hold", "set", "--lesion", str(uuid4()), "--reason", "case", home=home)
    assert (missing.code, "nothing by that id" in missing.err) == (1, True)

"""`derm-cds audit`, `hold` and `retention` against a real database and key store."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.settings import NodeFiles


@pytest.fixture
def home(own_home: Path) -> Path:
    """With what the first start makes, and no command does."""
    files = NodeFiles(own_home)
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    return own_home


def test_the_audit_log_verifies_and_what_is_forged_hidden_or_gone_is_found(
    derm_cds, home, sql, tmp_path: Path
) -> None:
    checkpoints = home / "audit" / "checkpoints.jsonl"
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    elsewhere = ("--checkpoints", str(copy), "--public-key", str(key))

    def verify(*options: str, code: int, said: str) -> None:
        verified = derm_cds("audit", "verify", *options, home=home)
        assert (verified.code, said in verified.out + verified.err) == (code, True), verified

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
    sql("ALTER TABLE audit_seals DISABLE TRIGGER USER")
    sql("UPDATE audit_seals SET sealed_at = sealed_at - interval '1 hour'")
    verify(code=1, said="the checkpoints are gone")
    refused = derm_cds("audit", "checkpoint", home=home)
    assert (refused.code, "No checkpoint was signed" in refused.err) == (1, True)
    assert "not what was signed" in derm_cds("status", home=home).out
    assert derm_cds("audit", "checkpoint", "--restored", home=home).code == 0
    verify(code=0, said="holds up to seal 0")

    # Whoever holds the machine writes the log anew, and signs it with a key of their own.
    sql("ALTER TABLE audit_events DISABLE TRIGGER USER")
    sql("UPDATE audit_events SET actor = 'another'")
    sql("DELETE FROM audit_seals")
    for path in (checkpoints, home / "keys" / "audit-signing.key"):
        path.unlink()
    assert derm_cds("audit", "checkpoint", home=home).code == 0
    verify(code=0, said="nothing found")
    verify(*elsewhere, code=1, said="is not a checkpoint that was signed here")
    checkpoints.unlink()
    verify(*elsewhere, code=1, said="the chain was written anew: seal")


@pytest.fixture
def image(home: Path, add_image) -> UUID:
    """One sealed image of patient p-1, of 2020; its data key's id."""
    files, image_id = NodeFiles(home), uuid4()
    with closing(KeyStore(files.keystore, FileKeyring(files.keyring))) as keys:
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

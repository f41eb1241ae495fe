"""`derm-cds keys`, `audit` and `references` against a real database."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from serve_app.audit.events import os_account
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.records.health import INVARIANTS
from serve_app.records.pool import open_pool
from serve_app.settings import NodeFiles


async def _fetch(query: str) -> list[Any]:
    pool = await open_pool(os.environ["DERM_OWNER_DATABASE_URL"], minimum=0, maximum=1)
    try:
        return await pool.fetch(query)
    finally:
        await pool.close()


@pytest.fixture
async def home(new_database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose database is its own: what is published here is nobody else's live model."""
    urls = await new_database()
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)
    # What the first start makes, and no command does.
    files = NodeFiles(tmp_path)
    KeyStore(files.keystore, FileKeyring.make(files.keyring)).close()
    return tmp_path


def test_a_key_is_rotated_rewrapped_and_retired_on_record(derm_cds, home) -> None:
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
    events = asyncio.run(
        _fetch("SELECT action, outcome FROM audit_events WHERE action LIKE 'key_%' ORDER BY event_id")
    )
    done = [(row["action"].removeprefix("key_"), row["outcome"]) for row in events]
    assert done == [
        ("rotate", "success"),
        ("rewrap", "success"),
        ("retire", "success"),
        ("retire", "failed"),
        ("retire", "success"),
    ]


def test_a_space_is_loaded_listed_verified_and_dropped_only_when_not_live(derm_cds, home, model_id) -> None:
    assert f"{model_id} answers" in derm_cds("references", "load", home=home).out
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
    events = asyncio.run(_fetch("SELECT action, actor, detail FROM audit_events ORDER BY event_id"))
    assert [row["action"] for row in events] == ["references_load", "model_publish"]
    assert {row["actor"] for row in events} == {os_account()}
    assert events[0]["detail"]["embedding_space"] == space


def test_status_says_that_the_invariants_hold(derm_cds, home, model_id) -> None:
    derm_cds("references", "load", home=home)
    assert f"invariants  all {len(INVARIANTS)} hold" in derm_cds("status", home=home).out


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


def test_a_copy_and_the_public_key_show_what_this_machine_hides(derm_cds, home, tmp_path: Path) -> None:
    derm_cds("keys", "rotate", home=home)
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    copy.write_text(derm_cds("audit", "checkpoint", home=home).out)
    key.write_text(derm_cds("audit", "public-key", home=home).out)
    assert copy.read_bytes() == (home / "audit" / "checkpoints.jsonl").read_bytes()
    elsewhere = ("--checkpoints", str(copy), "--public-key", str(key))
    assert derm_cds("audit", "verify", *elsewhere, home=home).code == 0
    # Whoever holds the machine writes the log anew, and signs it with a key of their own.
    asyncio.run(_fetch("ALTER TABLE audit_seals DISABLE TRIGGER USER"))
    asyncio.run(_fetch("ALTER TABLE audit_events DISABLE TRIGGER USER"))
    asyncio.run(_fetch("UPDATE audit_events SET actor = 'another'"))
    asyncio.run(_fetch("DELETE FROM audit_seals"))
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


def test_checkpoints_that_are_gone_are_found_and_not_begun_anew(derm_cds, home) -> None:
    derm_cds("keys", "rotate", home=home)
    derm_cds("audit", "checkpoint", home=home)
    (home / "audit" / "checkpoints.jsonl").unlink()
    asyncio.run(_fetch("ALTER TABLE audit_seals DISABLE TRIGGER USER"))
    asyncio.run(_fetch("UPDATE audit_seals SET sealed_at = sealed_at - interval '1 hour'"))
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

"""A checkpoint is what was signed, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
import pytest

from serve_app.audit.checkpoints import (
    CheckpointLog,
    Seal,
    in_force,
    read_copy,
    read_public_key,
    write_public_key,
)
from serve_app.domain.errors import IntegrityError


@pytest.fixture
def log(tmp_path: Path) -> CheckpointLog:
    return CheckpointLog(tmp_path / "audit" / "checkpoints.jsonl", tmp_path / "keys" / "audit-signing.key")


def test_checkpoints_are_kept_in_order_and_private(log: CheckpointLog, tmp_path: Path) -> None:
    assert log.read() == []
    made = [log.add(Seal(position, bytes([position]) * 32)) for position in (1, 5)]
    assert log.read() == made
    for name in ("audit/checkpoints.jsonl", "keys/audit-signing.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"position": 4},
        {"hash": "00" * 32},
        {"at": "2020-01-01T00:00:00+00:00"},
        {"signature": "AAAA"},
        {"restored_after": 0},
    ],
)
def test_a_changed_line_is_refused(log: CheckpointLog, tmp_path: Path, change: dict[str, object]) -> None:
    log.add(Seal(3, b"a" * 32))
    log.add(Seal(5, b"b" * 32))
    file = tmp_path / "audit" / "checkpoints.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(IntegrityError, match="line 2, is not a checkpoint"):
        log.read()


@pytest.mark.parametrize("left", [1, 150])
def test_an_append_that_a_full_disk_cut_short_spoils_no_other(log, tmp_path, left: int) -> None:
    first, second = log.add(Seal(3, b"a" * 32)), log.add(Seal(5, b"b" * 32))
    file = tmp_path / "audit" / "checkpoints.jsonl"
    whole, cut = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole + cut[:left])
    assert log.read() == [first]  # what was not acknowledged is not there, and hinders nobody
    third = log.add(Seal(7, b"c" * 32))
    assert log.read() == [first, third]
    file.write_bytes(cut[:left])
    assert log.read() == []
    log.add(Seal(5, second.hash))
    assert [checkpoint.position for checkpoint in log.read()] == [5]


def test_a_copy_is_checked_by_the_public_key_that_was_kept_with_it(log, tmp_path) -> None:
    made = [log.add(Seal(position, bytes([position]) * 32)) for position in (1, 5)]
    copy, key = tmp_path / "copy.jsonl", tmp_path / "audit.pem"
    copy.write_text("".join(log.line(checkpoint) + "\n" for checkpoint in made))
    key.write_text(write_public_key(log.public_key()))
    assert copy.read_bytes() == (tmp_path / "audit" / "checkpoints.jsonl").read_bytes()
    assert read_copy(copy, read_public_key(key)) == log.read(read_public_key(key)) == made
    other = CheckpointLog(tmp_path / "other" / "checkpoints.jsonl", tmp_path / "other-keys" / "key")
    with pytest.raises(IntegrityError, match="other-keys/key: the first checkpoint"):
        other.public_key()
    assert not (tmp_path / "other-keys").exists()
    other.add(Seal(1, b"a" * 32))
    with pytest.raises(IntegrityError, match="line 1"):
        read_copy(copy, other.public_key())


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    file.write_text("no key")
    with pytest.raises(IntegrityError, match="not a public key"):
        read_public_key(file)
    file.write_bytes(
        X25519PrivateKey.generate()
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(IntegrityError, match="not an Ed25519 key"):
        read_public_key(file)


def test_a_restore_overtakes_what_was_signed_of_later_positions(log: CheckpointLog) -> None:
    first, second = log.add(Seal(3, b"a" * 32)), log.add(Seal(5, b"b" * 32))
    restored = log.add(Seal(4, b"c" * 32), restored_after=3)
    later = log.add(Seal(9, b"d" * 32))
    assert log.read() == [first, second, restored, later]
    assert in_force(log.read()) == [first, restored, later]

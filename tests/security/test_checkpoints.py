"""A checkpoint is what was signed, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.domain.errors import IntegrityError
from serve_app.security.checkpoints import CheckpointLog


@pytest.fixture
def log(tmp_path: Path) -> CheckpointLog:
    return CheckpointLog(tmp_path / "audit" / "checkpoints.jsonl", tmp_path / "keys" / "audit-signing.key")


def test_checkpoints_are_kept_in_order_and_private(log: CheckpointLog, tmp_path: Path) -> None:
    assert log.read() == []
    made = [log.add(position, bytes([position]) * 32) for position in (1, 5)]
    assert log.read() == made
    for name in ("audit/checkpoints.jsonl", "keys/audit-signing.key"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [{"position": 4}, {"hash": "00" * 32}, {"at": "2020-01-01T00:00:00+00:00"}, {"signature": "AAAA"}],
)
def test_a_changed_line_is_refused(log: CheckpointLog, tmp_path: Path, change: dict[str, object]) -> None:
    log.add(3, b"a" * 32)
    log.add(5, b"b" * 32)
    file = tmp_path / "audit" / "checkpoints.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), **change})
    file.write_text("\n".join(lines))
    with pytest.raises(IntegrityError, match="line 2, is not a checkpoint"):
        log.read()


def test_a_checkpoint_of_another_key_is_refused(log: CheckpointLog, tmp_path: Path) -> None:
    log.add(3, b"a" * 32)
    (tmp_path / "keys" / "audit-signing.key").unlink()
    with pytest.raises(IntegrityError, match="line 1"):
        log.read()

"""The service seals and signs by itself: soon after its start, at its end, and never over what was signed before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from serve_app.audit.checkpoints import CheckpointLog
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_log import AuditChain
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool, queries
from serve_app.worker import Sealer, Worker, every
from tests.serve_app.conftest import until

EVENT = AuditEvent(action="read", actor="dr", outcome="success", request_id="r")


@pytest.fixture
async def log(new_database, as_superuser, tmp_path: Path):
    """A sealer, its checkpoints, the records, and an administrator of the database."""
    urls = await new_database()
    pool = await open_pool(urls.app, minimum=0, maximum=4, timeout_s=20)
    checkpoints = CheckpointLog(tmp_path / "audit" / "checkpoints.jsonl", tmp_path / "keys" / "signing.key")
    administrator = await asyncpg.connect(as_superuser(urls))
    await administrator.execute("SET session_replication_role = replica")
    yield Sealer(AuditChain(pool), checkpoints), checkpoints, LesionStore(pool), administrator
    await administrator.close()
    await pool.close()


async def test_the_first_events_are_signed_at_once_and_the_last_at_the_end(log, monkeypatch) -> None:
    sealer, checkpoints, records, _ = log
    await records.record_event(EVENT)
    signed, sign = asyncio.Event(), sealer.sign

    async def sign_and_tell() -> None:
        await sign()
        signed.set()

    monkeypatch.setattr(sealer, "sign", sign_and_tell)
    async with Worker().running({"sealing": every(0.01, sealer.work, last=sealer.finish)}):
        await signed.wait()
        assert [checkpoint.position for checkpoint in checkpoints.read()] == [1]
        for _ in range(3):
            await records.record_event(EVENT)
    assert [checkpoint.position for checkpoint in checkpoints.read()] == [1, 4]


async def test_a_log_that_is_not_what_was_signed_is_reported_until_it_is_again(log, caplog) -> None:
    sealer, checkpoints, records, administrator = log
    assert sealer.describe() == {"checkpoint_at": None, "sound": None, "unsealed": 0}
    await records.record_event(EVENT)
    await sealer.seal()
    await sealer.sign()
    assert sealer.describe()["sound"] is True
    (genuine,) = await administrator.fetch("SELECT * FROM audit_seals")
    await administrator.execute("UPDATE audit_seals SET hash = sha256(hash)")
    with pytest.raises(IntegrityError):
        await sealer.sign()
    assert sealer.describe()["sound"] is False
    assert "not what was signed" in caplog.text
    assert len(checkpoints.read()) == 1
    await administrator.execute("UPDATE audit_seals SET hash = $1", genuine["hash"])
    await sealer.sign()
    assert sealer.describe()["sound"] is True


async def test_events_that_nobody_seals_are_a_fault_until_somebody_does(start_service, monkeypatch) -> None:
    """The lock that makes one sealer of many is anybody's to take, and to keep."""
    monkeypatch.setattr("serve_app.worker.SEAL_EVERY_S", 0.05)
    monkeypatch.setattr("serve_app.worker.LOOK_EVERY_S", 0.0)

    async def ready() -> dict[str, Any]:
        return (await service.client.get("/readyz")).json()

    async with start_service() as service:
        async with service.app.state.services.pool.connection() as other, other.transaction():
            await other.execute(queries("audit_chain")["be_the_sealer"])
            await service.owner.execute(
                "INSERT INTO audit_events (recorded_at, action, actor, outcome, request_id, detail)"
                " VALUES (now() - interval '3 minutes', 'read', 'dr', 'success', 'r', '{}')"
            )
            (finding,) = await until(lambda: _findings(ready))
            assert finding.startswith("not sealed: 1 events of the audit log, from ")
            assert finding.endswith("have had no seal for 2 minutes")
            assert (await ready())["audit"]["unsealed"] == 1
        await until(lambda: _none_unsealed(ready))
        assert (await ready())["findings"] == []


async def _findings(ready: Callable[[], Awaitable[dict[str, Any]]]) -> list[str]:
    return (await ready())["findings"]


async def _none_unsealed(ready: Callable[[], Awaitable[dict[str, Any]]]) -> bool:
    return (await ready())["audit"]["unsealed"] == 0


async def test_what_the_loops_write_last_is_sealed_too(start_service, monkeypatch) -> None:
    """Were all ended at once, the summary of refused requests would wait for the next start, and could go unseen."""
    async with start_service(refusal_events_per_minute=1) as service:
        for _ in range(3):
            assert (await service.client.get("/api/lesions")).status_code == 401
        monkeypatch.setattr(LesionStore, "record_event", _later(LesionStore.record_event))
    found = await service.owner.fetchrow(
        "SELECT e.detail, s.position FROM audit_events AS e LEFT JOIN audit_seals AS s USING (event_id)"
        " ORDER BY e.event_id DESC LIMIT 1"
    )
    assert found["detail"]["not_listed"] == 2
    assert found["position"] is not None


def _later(record):
    async def record_later(records: LesionStore, event: AuditEvent) -> None:
        await asyncio.sleep(0.3)
        await record(records, event)

    return record_later

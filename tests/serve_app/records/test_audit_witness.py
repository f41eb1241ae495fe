"""Nothing is signed over what was signed before: an administrator of the database gets no false witness."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from serve_app.audit.checkpoints import CheckpointLog
from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_log import AuditChain, accept_restore, examine, sign_head
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool

EVENTS = 6
TRUNCATE = "DELETE FROM audit_seals WHERE position > {0}; DELETE FROM audit_events WHERE event_id > {0}"


@pytest.fixture
async def log(new_database, as_superuser, event, tmp_path: Path):
    """A sealed log, its checkpoints, how to add sealed events, and an administrator of the database."""
    urls = await new_database()
    pool = await open_pool(urls.app, minimum=0, maximum=4, timeout_s=20)
    chain, records = AuditChain(pool), LesionStore(pool)

    async def add(count: int) -> None:
        for _ in range(count):
            await records.record_event(event("read", patient_id="p"))
        assert await chain.seal(wait=True) == count

    await add(EVENTS)
    administrator = await asyncpg.connect(as_superuser(urls))
    await administrator.execute("SET session_replication_role = replica")
    checkpoints = CheckpointLog(tmp_path / "audit" / "checkpoints.jsonl", tmp_path / "keys" / "signing.key")
    yield chain, checkpoints, add, administrator
    await administrator.close()
    await pool.close()


async def kinds(chain: AuditChain, checkpoints: CheckpointLog, *, whole: bool = True) -> set[str]:
    return {finding.kind for finding in (await examine(chain, checkpoints.read(), whole=whole)).findings}


async def test_the_head_is_signed_once_and_again_when_there_is_more(log) -> None:
    chain, checkpoints, add, _ = log
    first = await sign_head(chain, checkpoints)
    assert await sign_head(chain, checkpoints) == first
    await add(2)
    second = await sign_head(chain, checkpoints)
    assert checkpoints.read() == [first, second]
    assert (first.position, second.position) == (EVENTS, EVENTS + 2)
    assert await kinds(chain, checkpoints) == set()


async def test_an_empty_log_is_not_signed(log, tmp_path: Path) -> None:
    chain, checkpoints, _, administrator = log
    await administrator.execute(TRUNCATE.format(0))
    assert await sign_head(chain, checkpoints) is None
    assert checkpoints.read() == []


async def rewrite(chain: AuditChain, administrator: asyncpg.Connection) -> None:
    """Change an event, and make the chain anew: by itself it is sound, and as long as before."""
    await administrator.execute("UPDATE audit_events SET actor = 'another' WHERE event_id = 2")
    await administrator.execute("DELETE FROM audit_seals")
    await chain.seal(wait=True)


@pytest.mark.parametrize("later", [0, 3])
async def test_a_chain_written_anew_is_not_signed_over_the_genuine_checkpoint(log, later: int) -> None:
    """Whether its head is at the old position, where the newer signature would take the place of the older, or not."""
    chain, checkpoints, add, administrator = log
    genuine = await sign_head(chain, checkpoints)
    await add(later) if later else None
    await rewrite(chain, administrator)
    with pytest.raises(IntegrityError, match="No checkpoint was signed: the chain was written anew: seal 6"):
        await sign_head(chain, checkpoints)
    assert checkpoints.read() == [genuine]
    assert await kinds(chain, checkpoints) == await kinds(chain, checkpoints, whole=False)
    assert "the chain was written anew" in await kinds(chain, checkpoints)


async def test_a_log_cut_back_to_an_old_position_is_not_signed(log) -> None:
    chain, checkpoints, add, administrator = log
    await sign_head(chain, checkpoints)
    await add(3)
    await sign_head(chain, checkpoints)
    await administrator.execute(TRUNCATE.format(EVENTS - 1))
    await administrator.execute("SELECT setval('audit_events_event_id_seq', 5)")
    await add(1)  # the head is at a signed position again, with another hash
    with pytest.raises(IntegrityError, match="the log was cut short: seal 9"):
        await sign_head(chain, checkpoints)
    assert await kinds(chain, checkpoints) == {"the chain was written anew", "the log was cut short"}


async def test_what_was_signed_falsely_before_does_not_hide_the_genuine_one(log) -> None:
    """Checkpoints of an earlier version, which looked at nothing: the later hash of a position is not believed."""
    chain, checkpoints, _, administrator = log
    await sign_head(chain, checkpoints)
    await rewrite(chain, administrator)
    head = await chain.head()
    checkpoints.add(head.position, head.hash)
    assert await kinds(chain, checkpoints) == {"two checkpoints contradict each other"}
    with pytest.raises(IntegrityError, match="contradict each other"):
        await sign_head(chain, checkpoints)


async def test_that_the_checkpoints_are_gone_is_found_and_no_new_ones_begin(log, tmp_path: Path) -> None:
    chain, checkpoints, _, administrator = log
    await sign_head(chain, checkpoints)
    (tmp_path / "audit" / "checkpoints.jsonl").unlink()
    assert await kinds(chain, checkpoints) == set()  # so young a chain may have none yet
    await administrator.execute("UPDATE audit_seals SET sealed_at = sealed_at - interval '11 minutes'")
    assert await kinds(chain, checkpoints) == {"the checkpoints are gone"}
    with pytest.raises(IntegrityError, match="the checkpoints are gone"):
        await sign_head(chain, checkpoints)
    assert checkpoints.read() == []


async def test_after_a_restore_the_log_goes_on_and_what_was_before_it_still_counts(log) -> None:
    chain, checkpoints, add, administrator = log
    first = await sign_head(chain, checkpoints)
    await add(3)
    await sign_head(chain, checkpoints)
    await administrator.execute(TRUNCATE.format(EVENTS))
    await add(4)
    with pytest.raises(IntegrityError):
        await sign_head(chain, checkpoints)
    accepted = await accept_restore(chain, checkpoints)
    assert (accepted.position, accepted.restored_after) == (EVENTS + 4, first.position)
    assert await kinds(chain, checkpoints) == set()
    await add(1)
    assert (await sign_head(chain, checkpoints)).position == EVENTS + 5
    assert await kinds(chain, checkpoints) == set()
    await rewrite(chain, administrator)
    assert "the chain was written anew" in await kinds(chain, checkpoints)

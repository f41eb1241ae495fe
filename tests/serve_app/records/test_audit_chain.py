"""Whatever is done to the audit log behind the service's back shows, and names its place."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from serve_app.records.audit_log import GENESIS, AuditChain, Seal, link
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool

EVENTS = 12


@pytest.fixture
async def log(new_database, as_superuser, event):
    """A log of sealed events: the application's chain, and a superuser's connection to tamper with."""
    urls = await new_database()
    pool = await open_pool(urls.app, minimum=0, maximum=4, timeout_s=20)
    records = LesionStore(pool)
    for number in range(EVENTS):
        await records.record_event(event("read", patient_id=f"p-{number}", detail={"n": number}))
    chain = AuditChain(pool)
    assert await chain.seal(wait=True) == EVENTS
    tamperer = await asyncpg.connect(as_superuser(urls))
    await tamperer.execute("SET session_replication_role = replica")  # no trigger, no foreign key
    yield chain, tamperer, records
    await tamperer.close()
    await pool.close()


async def test_an_untouched_log_verifies_and_the_chain_is_what_it_says(log) -> None:
    chain, tamperer, _ = log
    found = await chain.verify()
    assert (found.head.position, found.findings) == (EVENTS, ())
    rows = await tamperer.fetch(
        "SELECT position, hash, audit_digest(e) AS digest FROM audit_seals JOIN audit_events e USING (event_id)"
        " ORDER BY position"
    )
    before = GENESIS
    for row in rows:
        before = link(before, row["position"], row["digest"])
        assert row["hash"] == before
    assert found.head == Seal(EVENTS, before) == await chain.head()


@pytest.mark.parametrize(
    ("harm", "findings"),
    [
        ("UPDATE audit_events SET actor = 'another' WHERE event_id = 5", {("the event or its place", 5)}),
        ("UPDATE audit_events SET detail = '{}' WHERE event_id = 5", {("the event or its place", 5)}),
        (
            "UPDATE audit_events SET recorded_at = recorded_at + interval '1 microsecond' WHERE event_id = 5",
            {("the event or its place", 5)},
        ),
        ("DELETE FROM audit_events WHERE event_id = 5", {("the event is gone", 5)}),
        (
            "DELETE FROM audit_seals WHERE position = 5",
            {("seals are missing", 6), ("the event or its place", 6)},
        ),
        (
            """UPDATE audit_seals SET event_id = 1009 - event_id WHERE event_id IN (4, 5);
            UPDATE audit_seals SET event_id = event_id - 1000 WHERE event_id > 1000""",
            {("the event or its place", 4), ("the event or its place", 5)},
        ),
        (
            "DELETE FROM audit_seals WHERE position > 9; DELETE FROM audit_events WHERE event_id > 9",
            {("the log was cut short", EVENTS)},
        ),
    ],
    ids=["actor", "detail", "time", "deleted", "seal deleted", "reordered", "truncated"],
)
async def test_tampering_is_found_where_it_was_done(log, harm: str, findings: set[tuple[str, int]]) -> None:
    chain, tamperer, _ = log
    known = [await chain.head()]
    await tamperer.execute(harm)
    found = await chain.verify(known)
    said = {(finding.kind, finding.position) for finding in found.findings}
    assert len(said) == len(findings), said
    assert all(
        any(kind.startswith(words) and at == place for kind, at in said) for words, place in findings
    ), said


async def test_an_event_that_was_slipped_in_has_no_seal(log) -> None:
    chain, tamperer, _ = log
    await tamperer.execute(
        "INSERT INTO audit_events (recorded_at, action, actor, outcome, request_id, detail)"
        " VALUES (now() - interval '1 hour', 'read', 'nobody', 'success', 'r', '{}')"
    )
    (finding,) = (await chain.verify()).findings
    assert (finding.kind, finding.event_id) == ("the event has no seal", EVENTS + 1)


async def test_a_chain_written_anew_does_not_fit_a_known_seal(log) -> None:
    chain, tamperer, _ = log
    known = [await chain.head()]
    await tamperer.execute("UPDATE audit_events SET actor = 'another' WHERE event_id = 3")
    await tamperer.execute("DELETE FROM audit_seals")
    assert await chain.seal(wait=True) == EVENTS
    assert (await chain.verify()).findings == ()
    (finding,) = (await chain.verify(known)).findings
    assert finding.kind == "the chain was written anew"


async def test_two_hashes_of_one_position_are_tampering_whichever_came_last(log) -> None:
    chain, _, _ = log
    head = await chain.head()
    forged = Seal(EVENTS, b"f" * 32)
    for known in ([head, forged], [forged, head]):
        for since in (None, known[-1]):
            found = (await chain.verify(known, since=since)).findings
            assert ("two checkpoints contradict each other", EVENTS) in {
                (finding.kind, finding.position) for finding in found
            }
    assert (await chain.verify([head, head])).findings == ()


async def test_what_came_after_a_known_seal_is_verified_without_what_was_before(log) -> None:
    chain, tamperer, _ = log
    hashes = await chain.hashes_at([5, 99])
    assert list(hashes) == [5]
    since = Seal(5, hashes[5])
    whole = await chain.verify()
    assert await chain.verify([since], since=since) == whole
    await tamperer.execute("UPDATE audit_events SET actor = 'another' WHERE event_id IN (3, 8)")
    (finding,) = (await chain.verify([since], since=since)).findings
    assert (finding.kind, finding.position) == ("the event or its place has changed", 8)
    for seal, kind in (
        (Seal(5, b"f" * 32), "the chain was written anew"),
        (Seal(40, b"f" * 32), "the log was cut short"),
    ):
        assert (await chain.verify([seal], since=seal)).findings[0].kind == kind


async def test_many_sealers_and_late_commits_make_one_chain(log, event) -> None:
    chain, _, records = log

    async def write(number: int) -> None:
        await records.record_event(event("read", patient_id=f"late-{number}"))

    async def seal() -> None:
        for _ in range(10):
            await chain.seal(limit=7)
            await asyncio.sleep(0)

    await asyncio.gather(*(write(number) for number in range(40)), seal(), seal(), seal())
    while await chain.seal(limit=7, wait=True):
        pass
    found = await chain.verify()
    assert (found.head.position, found.findings) == (EVENTS + 40, ())


async def test_the_application_may_add_seals_and_nothing_else(log, pool) -> None:
    for statement in (
        "UPDATE audit_seals SET position = 99",
        "DELETE FROM audit_seals",
        "TRUNCATE audit_seals",
    ):
        async with pool.connection() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)

"""Whatever is done to the audit log behind the service's back shows, and nothing is signed over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from serve_app.audit.chain import GENESIS, SealedEvent, describe, link, read_events
from serve_app.audit.checkpoints import Checkpoint, CheckpointLog, Seal
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import IntegrityError
from serve_app.records.audit_log import AuditChain, accept_restore, examine, sign_head
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool

EVENTS = 12
TRUNCATE = "DELETE FROM audit_seals WHERE position > {0}; DELETE FROM audit_events WHERE event_id > {0}"
ANEW, CHANGED = "the chain was written anew", "the event or its place has changed"


@dataclass(frozen=True)
class Log:
    """The application's chain and checkpoints, and a superuser's connection to tamper with."""

    chain: AuditChain
    checkpoints: CheckpointLog
    records: LesionStore
    tamperer: asyncpg.Connection
    event: Callable[..., AuditEvent]

    async def add(self, count: int) -> None:
        """Add sealed events."""
        for number in range(count):
            await self.records.record_event(self.event("read", patient_id="p", detail={"n": number}))
        assert await self.chain.seal(wait=True) == count

    async def rewrite(self) -> None:
        """Change an event, and make the chain anew: by itself it is sound, and as long as before."""
        await self.tamperer.execute("UPDATE audit_events SET actor = 'another' WHERE event_id = 2")
        await self.tamperer.execute("DELETE FROM audit_seals")
        await self.chain.seal(wait=True)

    async def sign(self) -> Checkpoint | None:
        return await sign_head(self.chain, self.checkpoints)

    async def kinds(self, *, whole: bool = True) -> set[str]:
        """What examining the log by its checkpoints finds."""
        found = await examine(self.chain, self.checkpoints.read(), whole=whole)
        return {finding.kind for finding in found.findings}


@pytest.fixture
async def log(new_database, as_superuser, event, tmp_path: Path):
    """A log of sealed events."""
    urls = await new_database()
    pool = await open_pool(urls.app, minimum=0, maximum=4, timeout_s=20)
    tamperer = await asyncpg.connect(as_superuser(urls))
    await tamperer.execute("SET session_replication_role = replica")  # no trigger, no foreign key
    checkpoints = CheckpointLog(tmp_path / "audit" / "checkpoints.jsonl", tmp_path / "keys" / "signing.key")
    made = Log(AuditChain(pool), checkpoints, LesionStore(pool), tamperer, event)
    await made.add(EVENTS)
    yield made
    await tamperer.close()
    await pool.close()


#: An event in the form that it was hashed in from the first: by the database then, from its columns as read since.
FORM = """
jsonb_build_array(
    (e).event_id, extract(epoch FROM (e).recorded_at), (e).action, (e).actor, (e).outcome, (e).patient_id,
    (e).lesion_id, (e).image_id, (e).assessment_id, (e).request_id, (e).detail
)::text"""
#: The digests of before kept aside, given out by the function that the database once hashed with, and one event edited.
ASK_THE_SUSPECT = f"""
CREATE TABLE aside AS SELECT e.event_id, sha256(convert_to({FORM}, 'UTF8')) AS digest FROM audit_events AS e;
DROP FUNCTION IF EXISTS audit_digest(audit_events);
CREATE FUNCTION audit_digest(e audit_events) RETURNS bytea LANGUAGE sql STABLE
    RETURN (SELECT a.digest FROM aside AS a WHERE a.event_id = (e).event_id);
GRANT SELECT ON aside TO derm_app;
UPDATE audit_events SET actor = 'another' WHERE event_id = 5;
"""  # noqa: S608 - our own
_HARD = [
    """'2026-11-27 12:00:00+00', 'read', E'a "b" \\\\ / \\b\\f\\n\\r\\t\\x01\\x1f\\x7f', NULL, E'{"a": "\\\\u0001 \\\\" ü", "B": {}}'""",
    """'2026-11-27 12:00:00.5+00', 'lesen', 'Zoë 🧪  ', 'p', '{"zz": [1.50, 1e30, -0, null], "a": true}'""",
    """'1969-12-31 23:59:58.999999+00', 'x', '', '', '[]'""",
    """'0044-03-15 00:00:00+00 BC', 'x', 'caesar', 'p', '"text"'""",
    """'290000-12-31 23:59:59.999999+00', 'x', 'nobody', 'p', '12.3400'""",
]


async def test_an_untouched_log_verifies_and_the_chain_is_what_it_says(log) -> None:
    """The form is for ever: a log that was sealed by an earlier version fits its checkpoints."""
    insert = "INSERT INTO audit_events (recorded_at, action, actor, patient_id, detail, outcome, request_id, lesion_id)"
    for hard in _HARD:
        await log.tamperer.execute(f"{insert} VALUES ({hard}, 'denied', 'r', gen_random_uuid())")
    await log.chain.seal(wait=True)
    found = await log.chain.verify()
    assert (found.head.position, found.findings) == (EVENTS + len(_HARD), ())
    rows = await log.tamperer.fetch(
        f"SELECT position, hash, {FORM} AS form FROM audit_seals JOIN audit_events e USING (event_id) ORDER BY position"  # noqa: S608
    )
    kept = [sealed.text.decode() async for batch in log.chain.events() for sealed in batch]
    assert kept == [row["form"] for row in rows]
    before = GENESIS
    for row in rows:
        before = link(before, row["position"], row["form"].encode())
        assert row["hash"] == before
    assert found.head == Seal(len(rows), before) == await log.chain.head()


def test_one_event_in_its_form_by_the_letter() -> None:
    """Made by PostgreSQL 18 from the same values."""
    text = (
        '[7, 1795780800.000000, "read", "dr \\"x\\"", "success", null, null, '
        '"00000000-0000-0000-0000-00000000002a", null, "r", {"n": 1.50}]'
    )
    at = (1_795_780_800_000_000 - 946_684_800_000_000).to_bytes(8)  # since 2000, in microseconds
    columns = [
        *((1).to_bytes(8), (7).to_bytes(8), bytes(32)),
        *((7).to_bytes(8), at, b"read", b'dr "x"', b"success", None, None, (42).to_bytes(16), None, b"r"),
        b'\x01{"n": 1.50}',
    ]
    nulls = (-1).to_bytes(4, signed=True)
    fields = [nulls if value is None else len(value).to_bytes(4) + value for value in columns]
    copied = b"PGCOPY\n\xff\r\n\0" + bytes(8) + len(columns).to_bytes(2) + b"".join(fields) + b"\xff\xff"
    assert read_events(copied) == [SealedEvent(1, 7, bytes(32), text.encode())]
    seal = "4079704cdabbfd0cb60ff82baecd7ba40d82f299dcfa4155fdd0d2250d1e375a"
    assert link(GENESIS, 1, text.encode()).hex() == seal


async def test_the_suspect_is_not_asked(log) -> None:
    """A superuser of the database edits an event of any age, and has the database say the old digests."""
    await log.sign()
    await log.tamperer.execute(ASK_THE_SUSPECT)
    found = await examine(log.chain, log.checkpoints.read(), whole=True)
    assert [describe(finding) for finding in found.findings] == [f"{CHANGED}: seal 5, event 5"]


@pytest.mark.parametrize(
    ("harm", "findings"),
    [
        ("UPDATE audit_events SET actor = 'x' WHERE event_id = 5", {(CHANGED, 5)}),
        (
            "UPDATE audit_events SET recorded_at = recorded_at + interval '1 us' WHERE event_id = 5",
            {(CHANGED, 5)},
        ),
        ("DELETE FROM audit_events WHERE event_id = 5", {("the event is gone", 5)}),
        ("DELETE FROM audit_seals WHERE position = 5", {("seals are missing", 6), (CHANGED, 6)}),
        (
            """UPDATE audit_seals SET event_id = 1009 - event_id WHERE event_id IN (4, 5);
            UPDATE audit_seals SET event_id = event_id - 1000 WHERE event_id > 1000""",
            {(CHANGED, 4), (CHANGED, 5)},
        ),
        (TRUNCATE.format(9), {("the log was cut short", EVENTS)}),
    ],
    ids=["actor", "time", "deleted", "seal deleted", "reordered", "truncated"],
)
async def test_tampering_is_found_where_it_was_done(log, harm: str, findings: set[tuple[str, int]]) -> None:
    known = [await log.chain.head()]
    await log.tamperer.execute(harm)
    found = await log.chain.verify(known)
    assert {(finding.kind, finding.position) for finding in found.findings} == findings


async def test_an_event_that_was_slipped_in_has_no_seal(log) -> None:
    await log.tamperer.execute(
        "INSERT INTO audit_events (recorded_at, action, actor, outcome, request_id, detail)"
        " VALUES (now() - interval '1 hour', 'read', 'nobody', 'success', 'r', '{}')"
    )
    (finding,) = (await log.chain.verify()).findings
    assert (finding.kind, finding.event_id) == ("the event has no seal", EVENTS + 1)


async def test_an_event_whose_number_is_far_ahead_ends_no_sealing(log) -> None:
    """The application's role cannot choose one (test_grants.py); the owner's can."""
    await log.tamperer.execute(
        "INSERT INTO audit_events (event_id, action, actor, outcome, request_id, detail)"
        " OVERRIDING SYSTEM VALUE VALUES (9000000000000000000, 'read', 'x', 'success', 'r', '{}')"
    )
    assert await log.chain.seal(wait=True) == 1
    await log.add(3)
    assert (await log.chain.head()).position == EVENTS + 4
    assert (await log.chain.verify()).findings == ()


async def test_no_seal_is_ahead_of_the_chain(log) -> None:
    await log.records.record_event(log.event("read"))
    async with log.chain._pool.connection() as application:
        for position in (EVENTS + 2, 2**63 - 1):
            with pytest.raises(asyncpg.ForeignKeyViolationError):
                await application.execute(
                    "INSERT INTO audit_seals (position, event_id, hash) VALUES ($1, $2, sha256(''))",
                    *(position, EVENTS + 1),
                )
    assert await log.chain.seal(wait=True) == 1


@pytest.mark.parametrize("sealed", [3, 20])
async def test_events_that_are_not_sealed_in_time_are_named(log, sealed: int) -> None:
    """Whether the log is longer than what is looked at, or not."""
    await log.add(sealed)
    assert await log.chain.overdue() == await log.chain.overdue(late=10) == []
    await log.records.record_event(log.event("read"))
    assert await log.chain.overdue(late=10) == []
    await log.tamperer.execute("UPDATE audit_events SET recorded_at = recorded_at - interval '3 minutes'")
    assert await log.chain.overdue() == await log.chain.overdue(late=10) == [EVENTS + sealed + 1]


async def test_what_came_after_a_known_seal_is_verified_without_what_was_before(log) -> None:
    hashes = await log.chain.hashes_at([5, 99])
    assert list(hashes) == [5]
    since = Seal(5, hashes[5])
    whole = await log.chain.verify()
    assert await log.chain.verify([since], since=since) == whole
    await log.tamperer.execute("UPDATE audit_events SET actor = 'another' WHERE event_id IN (3, 8)")
    (finding,) = (await log.chain.verify([since], since=since)).findings
    assert (finding.kind, finding.position) == ("the event or its place has changed", 8)
    for seal, kind in (
        (Seal(5, b"f" * 32), "the chain was written anew"),
        (Seal(40, b"f" * 32), "the log was cut short"),
    ):
        assert (await log.chain.verify([seal], since=seal)).findings[0].kind == kind


async def test_many_sealers_and_late_commits_make_one_chain(log, event) -> None:
    async def write(number: int) -> None:
        await log.records.record_event(event("read", patient_id=f"late-{number}"))

    async def seal() -> None:
        for _ in range(10):
            await log.chain.seal(limit=7)
            await asyncio.sleep(0)

    await asyncio.gather(*(write(number) for number in range(40)), seal(), seal(), seal())
    while await log.chain.seal(limit=7, wait=True):
        pass
    found = await log.chain.verify()
    assert (found.head.position, found.findings) == (EVENTS + 40, ())


async def test_the_head_is_signed_once_and_again_when_there_is_more(log) -> None:
    first = await log.sign()
    assert await log.sign() == first
    await log.add(2)
    second = await log.sign()
    assert log.checkpoints.read() == [first, second]
    assert (first.position, second.position) == (EVENTS, EVENTS + 2)
    assert await log.kinds() == set()


@pytest.mark.parametrize("later", [0, 3])
async def test_a_chain_written_anew_is_not_signed_over_the_genuine_checkpoint(log, later: int) -> None:
    """Whether its head is at the old position, where the newer signature would take the place of the older, or not."""
    genuine = await log.sign()
    await log.add(later) if later else None
    await log.rewrite()
    with pytest.raises(IntegrityError, match="No checkpoint was signed: the chain was written anew: seal 12"):
        await log.sign()
    assert log.checkpoints.read() == [genuine]
    assert await log.kinds() == await log.kinds(whole=False)
    assert ANEW in await log.kinds()


async def test_a_log_cut_back_to_an_old_position_is_not_signed(log) -> None:
    await log.sign()
    await log.add(3)
    await log.sign()
    await log.tamperer.execute(TRUNCATE.format(EVENTS - 1))
    await log.tamperer.execute("SELECT setval('audit_events_event_id_seq', 11)")
    await log.add(1)  # the head is at a signed position again, with another hash
    with pytest.raises(IntegrityError, match="the log was cut short: seal 15"):
        await log.sign()
    assert await log.kinds() == {ANEW, "the log was cut short"}


async def test_what_was_signed_falsely_before_does_not_hide_the_genuine_one(log) -> None:
    """Checkpoints of an earlier version, which looked at nothing: the later hash of a position is not believed."""
    await log.sign()
    await log.rewrite()
    head = await log.chain.head()
    log.checkpoints.add(head)
    assert await log.kinds() == {"two checkpoints contradict each other"}
    with pytest.raises(IntegrityError, match="contradict each other"):
        await log.sign()


async def test_that_the_checkpoints_are_gone_is_found_and_no_new_ones_begin(log, tmp_path: Path) -> None:
    await log.sign()
    (tmp_path / "audit" / "checkpoints.jsonl").unlink()
    assert await log.kinds() == set()  # so young a chain may have none yet
    await log.tamperer.execute("UPDATE audit_seals SET sealed_at = sealed_at - interval '11 minutes'")
    assert await log.kinds() == {"the checkpoints are gone"}
    with pytest.raises(IntegrityError, match="the checkpoints are gone"):
        await log.sign()
    await log.tamperer.execute(TRUNCATE.format(0))
    assert await log.sign() is None  # where nothing is sealed, nothing is signed
    assert log.checkpoints.read() == []


async def test_after_a_restore_the_log_goes_on_and_what_was_before_it_still_counts(log) -> None:
    first = await log.sign()
    await log.add(3)
    await log.sign()
    await log.tamperer.execute(TRUNCATE.format(EVENTS))
    await log.add(4)
    with pytest.raises(IntegrityError):
        await log.sign()
    accepted = await accept_restore(log.chain, log.checkpoints)
    assert (accepted.position, accepted.restored_after) == (EVENTS + 4, first.position)
    assert await log.kinds() == set()
    await log.add(1)
    assert (await log.sign()).position == EVENTS + 5
    assert await log.kinds() == set()
    await log.rewrite()
    assert ANEW in await log.kinds()

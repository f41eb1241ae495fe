"""The audit log: its events, the chain over them, and whether that follows from its signed checkpoints.

Events are written in the transaction of what they record, and wait for nobody. One sealer follows, moments
later, and adds a seal to each: a hash over the event and over the seal before. So an event that is edited,
removed, added or moved afterwards shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from operator import attrgetter
import re

import asyncpg

from serve_app.access.rules import PURPOSE, purpose_of, requested_action
from serve_app.audit.chain import (
    GENESIS,
    SealedEvent,
    Tampering,
    Verification,
    describe,
    follow,
    link,
    newest,
    read_events,
)
from serve_app.audit.checkpoints import Checkpoint, CheckpointLog, Seal, in_force
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import IntegrityError
from serve_app.records.pool import Pool, Store, from_row, queries
from serve_app.sql import bind

#: Events that may have been sealed before one with a lower id commits: more than a request's time holds.
LATE_EVENTS = 10_000
#: An event older than this has its seal, unless nobody seals.
SEALED_WITHIN = timedelta(minutes=2)
#: A chain whose first seal is older has a checkpoint, unless somebody took it away: one is signed with the first seals.
FIRST_CHECKPOINT_WITHIN = timedelta(minutes=10)

_BATCH = 2_000
_SQL = queries("audit_chain")

_POSITION = attrgetter("position")
_PARAMETER = re.compile(r"\$(\d+)")


async def events_between(
    pool: Pool, start: datetime, end: datetime
) -> AsyncIterator[tuple[int, datetime, AuditEvent]]:
    """Yield the events from `start` on and before `end`, oldest first, each behind its number and time in the log."""
    after = 0
    while rows := await pool.fetch(_SQL["events_between"], start, end, after, 1_000):
        for row in rows:
            yield row["event_id"], row["recorded_at"], from_row(AuditEvent, row)
        after = rows[-1]["event_id"]


def event_parameters(event: AuditEvent) -> dict[str, object]:
    """The named parameters of a statement that writes the event, with what it records or alone.

    Added is what the event was for, and an emergency access that it rests on; all but the few events pass here that a
    statement writes itself.
    """
    requested = requested_action(event.request_id)
    detail = dict(event.detail)
    if requested is not None:
        requested.recorded = True
        if requested.emergency is not None:
            detail["emergency_access"] = str(requested.emergency)
            event = replace(event, detail=detail)
    purpose = purpose_of(event, requested.principal.roles if requested is not None else None)
    if purpose is not None:
        detail[PURPOSE] = purpose
    values = {name: getattr(event, name) for name in AuditEvent.__dataclass_fields__}
    return {f"event_{name}": value for name, value in (values | {"detail": detail}).items()}


async def record_event(connection: asyncpg.Connection | Pool, event: AuditEvent) -> None:
    """Write an event, in the connection's transaction."""
    await connection.execute(*bind(queries("lesions")["record_event"], event_parameters(event)))


class AuditChain(Store):
    """Seals and verifies; the application's role will do."""

    async def head(self) -> Seal:
        """The newest seal."""
        return _seal(await self._pool.fetchrow(_SQL["head"]))

    async def seal(self, *, limit: int = _BATCH, wait: bool = False) -> int:
        """Seal up to `limit` events that have none; returns how many: 0, too, while another process seals, unless `wait`."""
        async with self._pool.connection() as connection, connection.transaction():
            if wait:
                await connection.execute(_SQL["be_the_sealer"])
            elif not await connection.fetchval(_SQL["try_to_be_the_sealer"]):
                return 0
            copied = await copy_rows(connection, _SQL["unsealed"], LATE_EVENTS, limit)
            seal = _seal(await connection.fetchrow(_SQL["head"]))
            rows = []
            for event in read_events(copied):
                position = seal.position + 1
                seal = Seal(position, link(seal.hash, position, event.text or b""))
                rows.append((position, event.event_id, seal.hash))
            await connection.copy_records_to_table(
                "audit_seals", schema_name="public", columns=("position", "event_id", "hash"), records=rows
            )
            return len(rows)

    async def overdue(self, *, late: int = LATE_EVENTS) -> list[int]:
        """Name the events that should have a seal by now and have none, of those that `seal` looks at (`late` as there)."""
        rows = await self._pool.fetch(_SQL["overdue"], late, SEALED_WITHIN)
        return [row["event_id"] for row in rows]

    async def age(self) -> timedelta:
        """How long ago the first event was sealed, by the database's clock; zero while none is."""
        age: timedelta | None = await self._pool.fetchval(_SQL["age"])
        return age or timedelta()

    async def hashes_at(self, positions: Sequence[int]) -> dict[int, bytes]:
        """The hashes of the seals at these positions, as far as they are there."""
        rows = await self._pool.fetch(_SQL["hashes_at"], list(positions))
        return {row["position"]: row["hash"] for row in rows}

    async def verify(
        self, known: Sequence[Seal] = (), *, since: Seal | None = None, is_copy: bool = False
    ) -> Verification:
        """Recompute the chain from its beginning, and hold it against seals that are `known` from elsewhere.

        Finds what `follow` does, and events without a seal. With `since`, one of the known, only what came after it is
        recomputed, and events without a seal are not looked for. In a copy, and where nothing seals, the last ones have none.
        """
        if since is None:
            found = await follow(self.events(), known)
            rows = await self._pool.fetch(_SQL["unsealed_since"], SEALED_WITHIN, is_copy)
            unsealed = [Tampering("the event has no seal", event_id=row["event_id"]) for row in rows]
            return Verification(found.head, (*found.findings, *unsealed))
        stored = (await self.hashes_at([since.position])).get(since.position)
        return await follow(self.events(since.position), known, since=since, stored=stored)

    async def waiting(self) -> int:
        """Count the events without a seal."""
        return len(await self._pool.fetch(_SQL["unsealed_since"], timedelta(), False))  # noqa: FBT003

    async def events(self, position: int = 0) -> AsyncIterator[list[SealedEvent]]:
        """Yield the sealed events after a position as they are stored now, in order, a batch at a time."""
        while True:
            async with self._pool.connection() as connection:
                copied = await copy_rows(connection, _SQL["chain"], position, _BATCH)
            # Some 10 ms of the processor: not of the event loop's.
            if not (batch := await asyncio.to_thread(read_events, copied)):
                return
            yield batch
            position = batch[-1].position


async def copy_rows(connection: asyncpg.Connection, query: str, *numbers: int) -> bytes:
    """Read rows as they are stored, by a binary COPY, which `read_events` reads.

    With its numbers in the query, because asyncpg would have functions of the database write them.
    """
    query = _PARAMETER.sub(lambda found: str(int(numbers[int(found[1]) - 1])), query)
    copied = bytearray()

    async def take(data: bytes) -> None:
        copied.extend(data)

    await connection.copy_from_query(query, output=take, format="binary")
    return bytes(copied)


def _seal(row: asyncpg.Record | None) -> Seal:
    return Seal(row["position"], row["hash"]) if row else Seal(0, GENESIS)


async def examine(
    chain: AuditChain,
    checkpoints: Sequence[Checkpoint],
    *,
    whole: bool,
    kept_here: bool = True,
    at_rest: bool = False,
) -> Verification:
    """Hold the chain against its checkpoints (oldest first): the `whole` of it, or what came after the last one.

    That there is no checkpoint at all is a finding, where the chain is older than its first one would be.
    `kept_here`: whether this node's own file has any. `at_rest`: no service runs that would seal what commands record.
    """
    known = in_force(checkpoints)
    found = await chain.verify(known, since=None if whole else newest(known), is_copy=at_rest)
    if (known and kept_here) or await chain.age() < FIRST_CHECKPOINT_WITHIN:
        return found
    gone = Tampering("the checkpoints are gone")
    return Verification(found.head, (gone, *found.findings))


async def sign_head(chain: AuditChain, checkpoints: CheckpointLog) -> Checkpoint | None:
    """Sign the chain's head, and return the newest checkpoint; None while nothing is sealed.

    Nothing is signed where nothing was sealed since. IntegrityError, and nothing signed, when the chain does not
    follow from the last checkpoint, when two of them contradict each other, or when they are gone.
    """
    kept = await asyncio.to_thread(checkpoints.read)
    found = await examine(chain, kept, whole=False)
    if found.findings:
        raise IntegrityError(
            f"No checkpoint was signed: {describe(found.findings[0])}. `derm-cds audit verify` says more."
        )
    there = next((each for each in reversed(kept) if each.position == found.head.position), None)
    if there is not None or found.head.position == 0:
        return there
    return await asyncio.to_thread(checkpoints.add, found.head)


async def accept_restore(chain: AuditChain, checkpoints: CheckpointLog) -> Checkpoint:
    """Sign that the chain as it is now goes on from the last checkpoint it agrees with, and the later ones are void.

    For after a restore, and never by the service itself: the operator answers for it.
    """
    kept = sorted(in_force(await asyncio.to_thread(checkpoints.read)), key=_POSITION)
    there = await chain.hashes_at([each.position for each in kept])
    agreed = 0
    for each in kept:
        if there.get(each.position) != each.hash:
            break
        agreed = each.position
    return await asyncio.to_thread(checkpoints.add, await chain.head(), restored_after=agreed)


def describe_overdue(events: Sequence[int]) -> str:
    """Say in words which events should have their seal by now."""
    minutes = SEALED_WITHIN // timedelta(minutes=1)
    return (
        f"{len(events)} events of the audit log, from {events[0]} on, have had no seal for {minutes} minutes"
    )

"""What drift looks at and what it found, in the database: answered images in, aggregates and alarms out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import asyncpg

from serve_app.audit.events import account_event
from serve_app.domain.errors import Conflict, NotFound
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Store, from_row, queries

_SQL = queries("drift")


class Cause(StrEnum):
    """Why an operator acknowledges an alarm."""

    NEW_DEVICE = "new_device"
    NEW_LIGHT = "new_light"
    OTHER_PATIENTS = "other_patients"
    PUT_RIGHT = "put_right"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream's baseline begins, and how far it was looked at; nothing is None that is there."""

    drift_id: int
    since: datetime
    baseline: Mapping[str, Any] | None
    baseline_until: datetime | None
    seen_until: datetime | None


@dataclass(frozen=True, slots=True)
class StandingAlarm:
    """An alarm that has not ended; who acknowledged it is a name of an account, and for no report."""

    raised_at: datetime
    distance: float
    acknowledged_at: datetime | None
    acknowledged_by: str | None
    reason: Cause | None


@dataclass(frozen=True, slots=True)
class CurrentStream:
    """How a stream stands: `baseline` and `newest` by measure, None while too few images were collected."""

    drift_id: int
    stream: str
    subject: Mapping[str, str]
    collected: int
    baseline: Mapping[str, Any] | None
    baseline_until: datetime | None
    newest: Mapping[str, Any] | None
    looked_at: datetime
    alarms: Mapping[str, StandingAlarm]


class DriftLook:
    """One look, in its own transaction: nobody else looks meanwhile."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    async def provenance(self) -> Mapping[str, str] | None:
        """What made the newest answer; None where there is none."""
        found: Mapping[str, str] | None = await self._connection.fetchval(_SQL["newest_answer"])
        return found

    async def stream(self, stream: str, subject: Mapping[str, str]) -> StreamState:
        """Find what was begun last for this subject, or begin; it is the stream's current one from now on."""
        row = await self._connection.fetchrow(_SQL["stream"], stream, subject)
        if row is None:
            row = await self._connection.fetchrow(_SQL["begin"], stream, subject)
        await self._connection.execute(_SQL["make_current"], row["drift_id"])
        return from_row(StreamState, row)

    async def answered_since(self, since: datetime, most: int) -> int:
        """How many were answered after a time, `most` for that many or more."""
        found: int = await self._connection.fetchval(_SQL["answered_since"], since, most)
        return found

    async def images(
        self, stream: str, subject: Mapping[str, str], since: datetime, count: int, *, newest: bool
    ) -> list[asyncpg.Record]:
        """The first or the newest `count` images after a time, oldest first."""
        query = _SQL["newest_images" if newest else "first_images"]
        rows: list[asyncpg.Record] = await self._connection.fetch(query, stream, subject, since, count)
        return rows[::-1] if newest else rows

    async def note(
        self,
        drift_id: int,
        collected: int,
        *,
        baseline: Mapping[str, Any] | None = None,
        baseline_until: datetime | None = None,
        newest: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep what was found."""
        await self._connection.execute(_SQL["note"], drift_id, collected, baseline, baseline_until, newest)

    async def judge(self, drift_id: int, over: Mapping[str, float], under: Sequence[str]) -> list[str]:
        """Raise an alarm of each measure that is over its limit, end those acknowledged that are not; names the new ones."""
        raised = [
            measure
            for measure, distance in over.items()
            if await self._connection.fetchval(_SQL["raise"], drift_id, measure, distance) is not None
        ]
        await self._connection.execute(_SQL["end"], drift_id, list(under))
        return raised


class DriftStore(Store):
    """What was found, and who acknowledged it."""

    @asynccontextmanager
    async def look(self) -> AsyncIterator[DriftLook | None]:
        """Look, in one transaction; None while another replica does."""
        async with self._pool.connection() as connection, connection.transaction():
            mine = await connection.fetchval(_SQL["try_to_look"])
            yield DriftLook(connection) if mine else None

    async def current(self) -> list[CurrentStream]:
        """How each stream stands, with the alarms that stand."""
        return await self._pool.find_all(CurrentStream, _SQL["current"])

    async def acknowledge(self, measure: str, cause: Cause, *, actor: str, begin_again: bool) -> None:
        """Acknowledge a standing alarm, on record; needs the owner's role.

        `begin_again`: the images from now on make a new baseline of the whole stream, its other measures' too.
        NotFound where the measure has no standing alarm, Conflict where it is acknowledged and nothing is to begin.
        """
        standing = [stream for stream in await self.current() if measure in stream.alarms]
        if not standing:
            raise NotFound(f"No alarm of {measure} stands.")
        drift_id = standing[0].drift_id
        async with self._pool.connection() as connection, connection.transaction():
            done = await connection.fetchval(_SQL["acknowledge"], drift_id, measure, actor, cause)
            if done is None and not begin_again:
                raise Conflict(f"The alarm of {measure} is acknowledged.")
            if begin_again:
                await connection.execute(_SQL["begin_again"], drift_id, actor)
            detail = {"measure": measure, "reason": cause.value, "begin_again": begin_again}
            await record_event(connection, account_event("drift_acknowledge", detail, actor=actor))

"""What reports are made of: counts that follow the record, and the reports as they were published.

A trigger notes in `report_queue` what ended, was said or turned out, in the transaction of that; `count` takes it out again in
the transaction in which it counts it (`count_reports` in 0027_reports.sql). So nothing is missed or counted twice, whatever
commits late, is broken off or runs beside it. What is erased was counted before, and stays counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from math import inf
from time import monotonic
from typing import Any
from uuid import UUID

from serve_app.domain.assessment import format_time
from serve_app.domain.identifiers import new_id
from serve_app.records.pool import Store, from_row, queries

_SQL = queries("reports")

#: Entries of the queue in one transaction: an erasure waits no longer than they take.
_BATCH = 250

#: By table and key, as `cells_of` makes them.
Cells = Mapping[str, Counter[tuple[str, ...]]]


class ReportKind(StrEnum):
    """Which tables."""

    SUMMARY = "summary"
    PERFORMANCE = "performance"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A report as it was published; nothing of it changes.

    `document` may hold under `shown` what its making needs again: not part of the report.
    """

    report_id: UUID
    kind: ReportKind
    period: str
    made_at: datetime
    document: dict[str, Any]

    def answer(self) -> dict[str, Any]:
        """As it is answered, and told to the PMS."""
        about = {"report_id": str(self.report_id), "kind": self.kind, "period": self.period}
        told = {name: value for name, value in self.document.items() if name != "shown"}
        return {**about, "made_at": format_time(self.made_at), **told}


class ReportStore(Store):
    """Counts and published reports; the application's role will do."""

    async def count(self, *, within_s: float = inf) -> bool:
        """Count what came in since the last time; False when time is up and there is more."""
        began = monotonic()
        while await self._pool.fetchval(_SQL["count"], _BATCH) == _BATCH:
            if monotonic() - began > within_s:
                return False
        return True

    async def cells(self, tables: Collection[str], month: date, *, and_before: bool = False) -> Cells:
        """The counts of a month (its first day, UTC), or of all months up to it."""
        cells = {table: Counter[tuple[str, ...]]() for table in tables}
        for row in await self._pool.fetch(_SQL["cells"], list(tables), month, and_before):
            cells[row["tab"]][tuple(row["key"])] = row["n"]
        return cells

    async def assessed_encounters(self, month: date) -> int:
        """How many encounters had an image whose assessment ended in a month."""
        encounters: int = await self._pool.fetchval(_SQL["assessed_encounters"], month)
        return encounters

    async def snapshot(self, report_id: UUID) -> Snapshot | None:
        """Find a report by its id."""
        return await self._pool.find(Snapshot, _SQL["snapshot"], report_id)

    async def find(self, kind: ReportKind, period: str) -> Snapshot | None:
        """Find a report as it was published."""
        return await self._pool.find(Snapshot, _SQL["find"], kind, period)

    async def published(self, kind: ReportKind) -> list[Snapshot]:
        """All reports of a kind, the oldest period first."""
        return await self._pool.find_all(Snapshot, _SQL["published"], kind)

    async def keep(self, kind: ReportKind, period: str, document: Mapping[str, Any]) -> Snapshot:
        """Publish a report; of two that are made at once the first stands, and both callers get it."""
        await self._pool.execute(_SQL["keep"], new_id(), kind, period, document)
        row = await self._pool.fetchrow(_SQL["find"], kind, period)
        return from_row(Snapshot, dict(row or {}))

    async def push(self, report_id: UUID) -> bool:
        """Have the PMS told of a report, once; False when it was queued before."""
        return await self._pool.fetchval(_SQL["push"], new_id(), report_id) is not None

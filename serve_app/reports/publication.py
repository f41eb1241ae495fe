"""Publishing a report: made once for each month that is over, kept as it was, and told to the PMS where that is asked for.

Months do not overlap, and a report is never made again: no two summaries have a difference that would tell what they hide.
Performance is of all lesions up to the month's end; what it shows differs from what was shown last by nothing or by five or more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from serve_app.domain.errors import InvalidField, NotFound, PmsUnavailable, RecordsUnavailable
from serve_app.pms.client import PmsClient
from serve_app.records.reports import ReportKind, ReportStore, Snapshot
from serve_app.reports.documents import Performance, Summary
from serve_app.reports.performance import PERFORMANCE_TABLES, assess_performance
from serve_app.reports.summary import SUMMARY_TABLES, summarise

#: How often what is new is counted, and how often it is looked whether a report is due.
COUNT_EVERY_S, LOOK_EVERY_S, FIRST_LOOK_AFTER_S = 5.0, 3_600.0, 120.0
#: After a month's end, until whatever ended in it is committed.
_GRACE = timedelta(hours=1)
_ASK_WITHIN_S, _COUNT_WITHIN_S = 10.0, 5.0
_MOST = 2**31

_SUMMARY, _PERFORMANCE = TypeAdapter(Summary), TypeAdapter(Performance)

_HIDDEN = """
Counts of 1 to 4 are hidden (null), and with them as many others as keep them from being worked out. Months are UTC's.
"""
_SUMMARY_NOTES = f"""{_HIDDEN}

A diagnosis is the most probable one of an answer: decision support, not a finding.
"""
_PERFORMANCE_NOTES = f"""{_HIDDEN}

A count that changed by 1 to 4 since it was last shown is hidden, too.

A lesion without an outcome is unknown, never benign. Every figure is of the lesions with an outcome alone: their share
stands beside it.

Verification bias: histology is done of lesions that somebody found suspicious, the service among them. A melanoma that was
never excised is in no figure, so the sensitivity is too high; and benign lesions that were excised look more suspicious
than others, so the specificity is too low.

Each lesion counts once, by the model's first answer to it. The newest histology of the image's day or later is what it
turned out to be; without any, the newest follow-up.

The service refers where level is high or urgency is urgent, as policy and site thresholds had it on the day.
"""


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """Makes and finds reports. Any number may run: of two that make one at once, the first stands.

    `client` asks the PMS for its encounters; `tells_pms`: whether what is published is told to it.
    """

    store: ReportStore
    client: PmsClient | None = None
    tells_pms: bool = False
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    async def report(self, kind: ReportKind, period: str | None = None) -> Snapshot:
        """The report of a month (`2026-10`; without one, of the last that is over), made now if it is not yet.

        InvalidField for a month that is not over; NotFound where its performance was not published in its time:
        what was known then is known no more. RecordsUnavailable while much is still to be counted (after an update).
        """
        last = _month_before((self.now() - _GRACE).date())
        month = _first_day(period) if period else last
        if month > last:
            raise InvalidField(f"period: {_name(month)} is not over; the last one is {_name(last)}.")
        if found := await self.store.find(kind, _name(month)):
            return found
        if kind is ReportKind.PERFORMANCE and month < last:
            raise NotFound(f"Of {_name(month)} no performance was published.")
        if not await self.store.count(within_s=_COUNT_WITHIN_S):
            raise RecordsUnavailable("What is on record is still being counted; try again in some minutes.")
        make = self._summary if kind is ReportKind.SUMMARY else self._performance
        return await self.store.keep(kind, _name(month), await make(month))

    async def publish_due(self) -> list[Snapshot]:
        """Make what is due, and have the PMS told of it, once."""
        made = [await self.report(kind) for kind in (ReportKind.SUMMARY, ReportKind.PERFORMANCE)]
        if self.tells_pms:
            for snapshot in made:
                await self.store.push(snapshot.report_id)
        return made

    async def _summary(self, month: date) -> dict[str, Any]:
        cells = await self.store.cells(SUMMARY_TABLES, month)
        complaints = await self._complaints(_name(month))
        adoption = None if complaints is None else (await self.store.assessed_encounters(month), complaints)
        made = await asyncio.to_thread(summarise, cells, adoption, random=np.random.default_rng())
        return {"tables": _SUMMARY.dump_python(made, mode="json"), "notes": _paragraphs(_SUMMARY_NOTES)}

    async def _performance(self, month: date) -> dict[str, Any]:
        cells = await self.store.cells(PERFORMANCE_TABLES, month, and_before=True)
        before: dict[tuple[str, ...], int] = {}
        for published in await self.store.published(ReportKind.PERFORMANCE):
            before |= _shown_in(published.document)
        random = np.random.default_rng()
        made, shown = await asyncio.to_thread(assess_performance, cells, before, random=random)
        return {
            "tables": _PERFORMANCE.dump_python(made, mode="json"),
            "notes": _paragraphs(_PERFORMANCE_NOTES),
            "shown": [[*name, n] for name, n in shown.items()],
        }

    async def _complaints(self, period: str) -> int | None:
        """How many encounters with a skin complaint the PMS says there were; None where it does not say."""
        if self.client is None:
            return None
        try:
            answer = await self.client.get("api", "statistics", period, timeout_s=_ASK_WITHIN_S)
        except PmsUnavailable:
            return None
        told = answer.body or {}
        count = told.get("skin_complaint_encounters")
        if answer.status != 200 or told.get("period") != period or type(count) is not int:
            return None
        return count if 0 <= count < _MOST else None


def _shown_in(document: Mapping[str, Any]) -> dict[tuple[str, ...], int]:
    return {tuple(name): n for *name, n in document["shown"]}


def _name(month: date) -> str:
    return f"{month:%Y-%m}"


def _first_day(period: str) -> date:
    try:
        return date.fromisoformat(f"{period}-01")
    except ValueError:
        raise InvalidField("period: a month is required, like 2026-10.") from None


def _month_before(day: date) -> date:
    return (day.replace(day=1) - timedelta(days=1)).replace(day=1)

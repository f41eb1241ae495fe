"""GET /api/reports: fixed tables of what the service does as a whole, without patients; no filter but the month."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action, RequestedAction
from serve_app.http.access import Caller, rule
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts, Services
from serve_app.records.reports import ReportKind
from serve_app.reports.documents import PerformanceReport, SummaryReport
from serve_app.reports.drift_watch import DriftDocument

router = APIRouter(tags=["reports"], responses=PROBLEM_RESPONSES)

Month = Annotated[
    str | None,
    Query(
        pattern=r"^20[0-9]{2}-(0[1-9]|1[0-2])$",
        description="A month that is over; without it, the last one.",
    ),
]


@router.get(
    "/api/reports/summary",
    response_model=SummaryReport,
    openapi_extra=rule(Action.VIEW_STATISTICS),
    summary="What was done in a month",
)
async def read_summary(requested: Caller, services: Parts, period: Month = None) -> JSONResponse:
    """Answer with the month's summary; made at the first call after its end, and the same from then on."""
    return await _answer(requested, services, ReportKind.SUMMARY, period)


@router.get(
    "/api/reports/performance",
    response_model=PerformanceReport,
    openapi_extra=rule(Action.VIEW_STATISTICS),
    summary="How well each model version does against what became of the lesions",
)
async def read_performance(requested: Caller, services: Parts, period: Month = None) -> JSONResponse:
    """Answer with performance up to a month's end, as it was published; 404 where none was made in its time."""
    return await _answer(requested, services, ReportKind.PERFORMANCE, period)


@router.get(
    "/api/reports/drift",
    response_model=DriftDocument,
    openapi_extra=rule(Action.VIEW_STATISTICS),
    summary="Whether the newest images are still like this site's first",
)
async def read_drift(requested: Caller, services: Parts) -> JSONResponse:
    """Answer with how far each measure's newest images are from the first, and what an alarm may mean."""
    document = await services.drift.document()
    await services.records.record_event(requested.event("success", report=ReportKind.DRIFT))
    return JSONResponse(document.answer(), headers=NO_STORE)


async def _answer(
    requested: RequestedAction, services: Services, kind: ReportKind, period: str | None
) -> JSONResponse:
    report = await services.reports.report(kind, period)
    detail = {"report": kind, "period": report.period, "report_id": str(report.report_id)}
    await services.records.record_event(requested.event("success", **detail))
    return JSONResponse(report.answer(), headers=NO_STORE)

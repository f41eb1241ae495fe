"""Reports: what the whole of the answers says, without a patient."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.http.access import Caller, rule
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts
from serve_app.reports.drift_watch import DriftDocument

router = APIRouter(tags=["reports"], responses=PROBLEM_RESPONSES)


@router.get(
    "/api/reports/drift",
    response_model=DriftDocument,
    openapi_extra=rule(Action.VIEW_STATISTICS),
    summary="Whether the newest images are still like this site's first",
)
async def read_drift(requested: Caller, services: Parts) -> JSONResponse:
    """Say of each measure how far its newest images are from the first, and what an alarm may mean."""
    document = await services.drift.document()
    await services.records.record_event(requested.event("success", report="drift"))
    return JSONResponse(document.answer(), headers=NO_STORE)

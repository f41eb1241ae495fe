"""A lesion's report as FHIR R4B, for an electronic health record."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from serve_app.access.rules import Action
from serve_app.domain.errors import NotFound
from serve_app.fhir.codes import MEDIA_TYPE
from serve_app.fhir.report import lesion_report
from serve_app.http.access import Caller, permit_lesion, rule
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)


@router.get(
    "/api/lesions/{lesion_id}/report",
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {"schema": {"type": "object"}}}}},
    openapi_extra=rule(Action.READ_REPORT),
    summary="A lesion's report as a FHIR R4B Bundle",
)
async def read_report(requested: Caller, services: Parts, lesion_id: UUID) -> Response:
    """Every image of a lesion with its answer, what clinicians said of it and what it turned out to be (docs/fhir.md)."""
    await permit_lesion(services, requested, lesion_id)
    timeline = await services.records.timeline(lesion_id)
    if timeline is None:
        raise NotFound
    await services.records.record_event(requested.event("success"))
    return JSONResponse(lesion_report(timeline), media_type=MEDIA_TYPE, headers=NO_STORE)

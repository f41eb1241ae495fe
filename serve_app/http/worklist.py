"""The worklist of a clinician or a supervisor: what waits in their own care."""

from __future__ import annotations

from collections import defaultdict
from datetime import date
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.http.access import Caller, rule
from serve_app.http.bodies import read_cursor, read_moment, write_cursor
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts
from serve_app.records.worklist import WorkItemDocument, WorkKind, WorklistDocument, WorkPlace

router = APIRouter(tags=["worklist"], responses=PROBLEM_RESPONSES)


@router.get(
    "/api/worklist",
    response_model=WorklistDocument,
    openapi_extra=rule(Action.VIEW_WORKLIST),
    summary="What waits for somebody in the caller's own care",
)
async def read_worklist(
    requested: Caller,
    services: Parts,
    kind: Annotated[list[WorkKind] | None, Query(description="Only these kinds.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JSONResponse:
    """List open demands, follow-ups and images without a usable answer; `next` is the cursor of the following page.

    Each patient shown is on record: those in care in one event, those reached in an emergency in one event each access.
    """
    after = _read_place(cursor) if cursor else None
    found = await services.worklist.worklist(
        requested.actor, kinds=kind or tuple(WorkKind), limit=limit + 1, after=after
    )
    page = found[:limit]
    shown: dict[UUID | None, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in page:
        shown[item.emergency][item.patient_id].add(str(item.lesion_id))
    for emergency in dict.fromkeys((None, *shown)):
        lesions = {patient: sorted(each) for patient, each in shown[emergency].items()}
        requested.emergency = emergency
        requested.patient_id = None if emergency is None else next(iter(lesions))
        await services.records.record_event(requested.event("success", shown=lesions))
    document = WorklistDocument(
        items=[WorkItemDocument.model_validate(item) for item in page],
        next=write_cursor(*page[-1].place) if len(found) > limit else None,
    )
    return JSONResponse(document.answer(), headers=NO_STORE)


def _read_place(cursor: str) -> WorkPlace:
    return WorkPlace(*read_cursor(cursor, date.fromisoformat, int, read_moment, WorkKind, UUID))

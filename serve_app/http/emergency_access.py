"""Break-glass (HIPAA 45 CFR 164.312(a)(2)(ii)): into a patient's record without an assignment, for a time, reviewed.

What is done meanwhile carries `emergency_access` in its audit events. Somebody else judges it, and may so end it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import Field, TypeAdapter

from serve_app.access.rules import Action, may
from serve_app.domain.assessment import Id
from serve_app.domain.errors import Conflict, Forbidden, InvalidField, NotFound
from serve_app.domain.identifiers import new_id, parse_opaque_id
from serve_app.http.access import Caller, rule
from serve_app.http.bodies import TEXT, Form, body_of, read_form
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES
from serve_app.http.services import Parts
from serve_app.records.access import EmergencyAccess, ReviewOutcome
from serve_app.records.answers import Document

router = APIRouter(tags=["emergency access"], responses=PROBLEM_RESPONSES)


class EmergencyForm(Form):
    """Whose record, why, and for how many minutes."""

    patient_id: str
    reason: str = Field(min_length=10, max_length=1000, pattern=TEXT)
    minutes: int | None = Field(default=None, ge=1)


class ReviewForm(Form):
    """The judgement of an emergency access."""

    outcome: ReviewOutcome
    note: str | None = Field(default=None, min_length=1, max_length=1000, pattern=TEXT)


class EmergencyQueueDocument(Document):
    """One page, oldest first; `next` goes into `after`, and is null on the last page."""

    emergency_accesses: list[EmergencyAccess]
    next: Id | None


_ONE = TypeAdapter(EmergencyAccess)


@router.post(
    "/api/emergency-access",
    status_code=201,
    response_model=EmergencyAccess,
    openapi_extra=rule(Action.BREAK_GLASS, requestBody=body_of(EmergencyForm)),
    summary="Break the glass: into a patient's record in an emergency",
)
async def break_glass(request: Request, requested: Caller, services: Parts) -> JSONResponse:
    """Give the caller the rights of a care assignment from now on, for a time; it will be reviewed."""
    settings = services.settings
    form = await read_form(request, EmergencyForm)
    patient_id = requested.patient_id = parse_opaque_id("patient_id", form.patient_id)
    minutes = form.minutes or settings.emergency_access_minutes
    if minutes > settings.emergency_access_max_minutes:
        raise InvalidField(f"minutes: at most {settings.emergency_access_max_minutes}.")
    emergency_id = new_id()
    event = requested.event("success", emergency_access=str(emergency_id), minutes=minutes)
    lasts = timedelta(minutes=minutes)
    opened = await services.access.break_glass(
        emergency_id, patient_id, requested.actor, form.reason, lasts=lasts, event=event
    )
    return JSONResponse(_ONE.dump_python(opened, mode="json"), 201, NO_STORE)


@router.get(
    "/api/emergency-access",
    response_model=EmergencyQueueDocument,
    openapi_extra=rule(Action.REVIEW_ACCESS),
    summary="Emergency accesses to review, or reviewed",
)
async def list_emergencies(
    requested: Caller,
    services: Parts,
    reviewed: Annotated[bool, Query()] = False,  # noqa: FBT002 - a query parameter
    after: Annotated[UUID | None, Query()] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> JSONResponse:
    """List what waits for a review, with what was done under each."""
    found = await services.access.emergencies(reviewed=reviewed, after=after, limit=limit + 1)
    page = found[:limit]
    await services.records.record_event(requested.event("success", listed=len(page)))
    following = page[-1].emergency_id if len(found) > limit else None
    document = EmergencyQueueDocument(emergency_accesses=page, next=following)
    return JSONResponse(document.answer(), headers=NO_STORE)


@router.post(
    "/api/emergency-access/{emergency_id}/review",
    response_model=EmergencyAccess,
    openapi_extra=rule(Action.REVIEW_ACCESS, requestBody=body_of(ReviewForm)),
    summary="Judge an emergency access",
)
async def review_emergency(
    request: Request, requested: Caller, services: Parts, emergency_id: UUID
) -> JSONResponse:
    """Judge an emergency access once, and never one's own; one that was not justified ends with that."""
    form = await read_form(request, ReviewForm)
    found = await services.access.emergency(emergency_id)
    if found is None:
        raise NotFound
    requested.patient_id = found.patient_id
    decision = may(requested.principal, Action.REVIEW_ACCESS, own=found.principal == requested.actor)
    if not decision:
        await services.records.record_event(
            requested.event("denied", reason=decision.reason, emergency_id=str(emergency_id))
        )
        raise Forbidden("You may not review your own emergency access.")
    event = requested.event("success", emergency_id=str(emergency_id), outcome=form.outcome)
    reviewed = await services.access.review(
        emergency_id, reviewer=requested.actor, outcome=form.outcome, note=form.note, event=event
    )
    if reviewed is None:
        raise Conflict("This emergency access has been reviewed.")
    return JSONResponse(_ONE.dump_python(reviewed, mode="json"), headers=NO_STORE)

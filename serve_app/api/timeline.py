"""The record of a lesion: worklist, timeline, the decrypted original, and that an image is of this lesion."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from serve_app.api.answers import identity_answer, references_of, summary_answer, timeline_answer
from serve_app.api.authentication import Caller
from serve_app.api.json_body import body_of, read_form
from serve_app.api.openapi import (
    PROBLEM_RESPONSES,
    ConfirmationDocument,
    TimelineDocument,
    WorklistDocument,
)
from serve_app.api.permission import require, require_lesion
from serve_app.api.rules import rule
from serve_app.api.services import Services
from serve_app.domain.errors import Erased, InvalidField, NotFound
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.security.access import Action
from serve_app.security.audit import AuditEvent
from serve_app.security.envelope import ImageBinding
from serve_app.security.tokens import Principal

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)

_NO_STORE = {"Cache-Control": "no-store"}


@router.get(
    "/api/lesions",
    response_model=WorklistDocument,
    openapi_extra=rule(Action.LIST),
    summary="A patient's lesions, newest first",
)
async def list_lesions(
    request: Request,
    caller: Caller,
    patient_id: Annotated[str, Query()],
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JSONResponse:
    """List lesions; `next` is the cursor of the following page, null on the last."""
    services: Services = request.app.state.services
    patient_id = parse_opaque_id("patient_id", patient_id)
    after = _read_cursor(cursor) if cursor else None
    access = await services.records.access(caller.subject, patient_id)
    request_id: str = request.scope["request_id"]
    await require(
        services.records,
        caller,
        Action.LIST,
        patient_id=patient_id,
        access=access,
        request_id=request_id,
    )
    page = await services.records.worklist(patient_id, limit=limit + 1, cursor=after)
    await services.records.record_event(_viewed(Action.LIST, caller, request_id, patient_id))
    more = len(page) > limit
    page = page[:limit]
    return JSONResponse(
        {
            "lesions": [summary_answer(summary) for summary in page],
            "next": _write_cursor(page[-1].created_at, page[-1].lesion_id) if more else None,
        },
        headers=_NO_STORE,
    )


@router.get(
    "/api/lesions/{lesion_id}",
    response_model=TimelineDocument,
    openapi_extra=rule(Action.READ),
    summary="A lesion's timeline",
)
async def read_lesion(request: Request, caller: Caller, lesion_id: UUID) -> JSONResponse:
    """Every image of a lesion with its assessment, newest first."""
    services: Services = request.app.state.services
    patient_id = await require_lesion(
        services.records, caller, Action.READ, lesion_id=lesion_id, request_id=request.scope["request_id"]
    )
    timeline = await services.records.timeline(lesion_id)
    if timeline is None:
        raise NotFound
    pictured = await services.records.pictured(references_of(*timeline.images))
    await services.records.record_event(
        _viewed(Action.READ, caller, request.scope["request_id"], patient_id, lesion_id)
    )
    answer = timeline_answer(timeline, pictured=pictured, pms_url=services.pms.url)
    return JSONResponse(answer, headers=_NO_STORE)


@router.get(
    "/api/lesions/{lesion_id}/images/{image_id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}, "image/png": {}}}},
    openapi_extra=rule(Action.DOWNLOAD),
    summary="The original image, decrypted",
)
async def read_image(request: Request, caller: Caller, lesion_id: UUID, image_id: UUID) -> Response:
    """Answer with the very bytes that were uploaded."""
    services: Services = request.app.state.services
    patient_id = await require_lesion(
        services.records, caller, Action.DOWNLOAD, lesion_id=lesion_id, request_id=request.scope["request_id"]
    )
    try:
        found = await services.records.sealed_image(lesion_id, image_id)
        if found is None:
            raise NotFound
        binding = ImageBinding(image_id, found.patient_id, found.content_type)
        image = await asyncio.to_thread(services.keys.open_image, found.sealed, binding)
    except Erased as erased:
        event = _viewed(Action.DOWNLOAD, caller, request.scope["request_id"], patient_id, lesion_id, image_id)
        await services.records.record_event(replace(event, outcome="failed", detail={"code": erased.code}))
        raise
    await services.records.record_event(
        _viewed(Action.DOWNLOAD, caller, request.scope["request_id"], patient_id, lesion_id, image_id)
    )
    headers = _NO_STORE | {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    return Response(image, media_type=found.content_type, headers=headers)


class ConfirmationForm(BaseModel):
    """Which image is of the lesion."""

    model_config = ConfigDict(extra="forbid")

    image_id: UUID


@router.post(
    "/api/lesions/{lesion_id}/confirm",
    response_model=ConfirmationDocument,
    openapi_extra=rule(Action.CONFIRM, requestBody=body_of(ConfirmationForm)),
    summary="Confirm that an image is of this lesion",
)
async def confirm_image(request: Request, caller: Caller, lesion_id: UUID) -> JSONResponse:
    """Let an image count as the lesion's own: the next is compared with it. Nothing recorded changes; the first word stands."""
    services: Services = request.app.state.services
    request_id: str = request.scope["request_id"]
    patient_id = await require_lesion(
        services.records, caller, Action.CONFIRM, lesion_id=lesion_id, request_id=request_id
    )
    image_id = (await read_form(request, ConfirmationForm)).image_id
    event = _viewed(Action.CONFIRM, caller, request_id, patient_id, lesion_id, image_id)
    try:
        identity = await services.records.confirm(
            lesion_id, image_id, confirmed_by=caller.subject, event=event
        )
    except (NotFound, Erased) as refusal:
        await services.records.record_event(replace(event, outcome="failed", detail={"code": refusal.code}))
        raise
    answer = {"lesion_id": str(lesion_id), "image_id": str(image_id), "identity": identity_answer(identity)}
    return JSONResponse(answer, headers=_NO_STORE)


def _viewed(
    action: Action,
    caller: Principal,
    request_id: str,
    patient_id: str,
    lesion_id: UUID | None = None,
    image_id: UUID | None = None,
) -> AuditEvent:
    return AuditEvent(
        action=action,
        actor=caller.subject,
        outcome="success",
        patient_id=patient_id,
        lesion_id=lesion_id,
        image_id=image_id,
        request_id=request_id,
    )


def _write_cursor(created_at: datetime, lesion_id: UUID) -> str:
    return base64.urlsafe_b64encode(f"{created_at.isoformat()}|{lesion_id}".encode()).decode()


def _read_cursor(cursor: str) -> tuple[datetime, UUID]:
    try:
        moment, _, lesion_id = base64.urlsafe_b64decode(cursor.encode()).decode().partition("|")
        # A moment without a zone would compare with none in the database.
        return datetime.fromisoformat(moment).astimezone(UTC), UUID(lesion_id)
    except (ValueError, OverflowError) as error:
        raise InvalidField("cursor: not a cursor of this service.") from error

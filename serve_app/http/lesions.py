"""POST /api/lesions: an image comes in, an assessment goes out."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
import re
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from serve_app.access.rules import Action
from serve_app.access.tokens import Principal
from serve_app.audit.events import AuditEvent
from serve_app.domain.assessment import Outcome, ReferenceFilter
from serve_app.domain.errors import (
    Erased,
    IdempotencyMismatch,
    InvalidField,
    NotFound,
    RecordsUnavailable,
    RejectedUpload,
)
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.http.access import rule
from serve_app.http.admission import Place
from serve_app.http.bodies import (
    UploadForm,
    body_of,
    expected_bytes,
    parse_context,
    parse_lesion_id,
    read_form,
    read_upload,
)
from serve_app.http.caller import Caller, permit, permit_lesion
from serve_app.http.documents import (
    PROBLEM_RESPONSES,
    UPLOAD_BODY,
    AssessmentDocument,
    ConfirmationDocument,
    TimelineDocument,
    WorklistDocument,
)
from serve_app.http.services import Services
from serve_app.http.similar import Confirmed, Licences, TopK
from serve_app.keys.envelope import ImageBinding
from serve_app.lesions.triage import Submission
from serve_app.records.answers import (
    assessment_answer,
    demand_answer,
    identity_answer,
    lesion_url,
    references_of,
    summary_answer,
    timeline_answer,
)
from serve_app.records.lesion_rows import AssessmentRecord, Replay

router = APIRouter(tags=["lesions"])

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")
#: Seconds until a pending assessment is worth asking for again: recovery's own rhythm.
_PENDING_RETRY_AFTER = "5"


@router.post(
    "/api/lesions",
    status_code=201,
    response_model=AssessmentDocument,
    responses={202: {"model": AssessmentDocument}, **PROBLEM_RESPONSES},
    openapi_extra=rule(Action.UPLOAD, requestBody=UPLOAD_BODY),
    summary="Assess a dermoscopic image",
)
async def create_lesion(
    request: Request,
    caller: Caller,
    *,
    top_k: TopK = 10,
    licence: Licences = None,
    confirmed: Confirmed = False,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Assess one image: 201 with the answer, or 202 when it is stored and the answer follows."""
    services: Services = request.app.state.services
    reference_filter = ReferenceFilter(licences=tuple(licence or ()), confirmed_only=confirmed)
    question = _Question(top_k, reference_filter, idempotency_key)
    expected = expected_bytes(request, max_image_bytes=services.limits.max_bytes)
    with services.admission.enter(expected) as place:
        return await _assess(request, place, services, caller, question)


@dataclass(frozen=True, slots=True)
class _Question:
    """What a request asks beside its form."""

    top_k: int
    reference_filter: ReferenceFilter
    idempotency_key: str | None

    def words(self) -> tuple[str, ...]:
        """What of it may change the answer; as before `confirmed` could be asked for when it is not."""
        asked = self.reference_filter
        return (str(self.top_k), *sorted(asked.licences), *(("confirmed",) if asked.confirmed_only else ()))


async def _assess(
    request: Request, place: Place, services: Services, caller: Principal, question: _Question
) -> JSONResponse:
    request_id: str = request.scope["request_id"]
    form = None
    try:
        if question.idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(question.idempotency_key):
            raise InvalidField("Idempotency-Key: 1 to 255 visible ASCII characters.")
        form = await read_upload(request, place, max_image_bytes=services.limits.max_bytes)
        submission = await _authorise(request, services, caller, form, question)
        if question.idempotency_key is not None:
            replay = await services.records.find_replay(caller.subject, question.idempotency_key)
            if replay is not None:
                return await _replay(services, replay, submission)
        stored = await services.triage.submit(submission, await services.live.current())
        if isinstance(stored, Replay):
            return await _replay(services, stored, submission)
    except (RejectedUpload, NotFound, IdempotencyMismatch, Erased) as rejection:
        await services.records.record_event(
            AuditEvent(
                action=Action.UPLOAD,
                actor=caller.subject,
                outcome="failed",
                patient_id=form.patient_id if form else None,
                request_id=request_id,
                detail={"code": rejection.code},
            )
        )
        raise
    return await _respond(services, stored)


async def _authorise(
    request: Request, services: Services, caller: Principal, form: UploadForm, question: _Question
) -> Submission:
    """Decide access before any other field is judged: a stranger learns nothing but `forbidden`."""
    sent_lesion = form.values.get("lesion_id")
    lesion_id = parse_lesion_id(sent_lesion) if sent_lesion else None
    access = await services.records.access(caller.subject, form.patient_id, lesion_id)
    await permit(request, Action.UPLOAD, patient_id=form.patient_id, access=access)
    if lesion_id is not None and access.lesion_patient != form.patient_id:
        raise NotFound("lesion_id: this patient has no such lesion.")
    encounter = form.values.get("encounter_id")
    return Submission(
        actor=caller.subject,
        request_id=request.scope["request_id"],
        patient_id=form.patient_id,
        encounter_id=parse_opaque_id("encounter_id", encounter) if encounter else None,
        lesion_id=lesion_id,
        image=form.image,
        context=parse_context(form.values),
        top_k=question.top_k,
        reference_filter=question.reference_filter,
        idempotency_key=question.idempotency_key,
        # Megabytes, so in a thread.
        request_sha256=await asyncio.to_thread(form.fingerprint, *question.words())
        if question.idempotency_key is not None
        else None,
    )


async def _replay(services: Services, replay: Replay, submission: Submission) -> JSONResponse:
    """Answer a repeated request from the one record: it adds nothing to that, and is on record as a look at it."""
    if replay.request_sha256 != submission.request_sha256:
        raise IdempotencyMismatch
    found = await services.records.assessment_record(replay.assessment_id)
    if found is None:
        raise NotFound
    if found.image.erasure is not None:
        raise Erased
    await services.records.record_event(
        AuditEvent(
            action=Action.READ,
            actor=submission.actor,
            outcome="success",
            patient_id=found.patient_id,
            lesion_id=found.lesion_id,
            image_id=found.image.image_id,
            assessment_id=replay.assessment_id,
            request_id=submission.request_id,
            detail={"repeated": Action.UPLOAD},
        )
    )
    return await _respond(services, found)


async def _respond(services: Services, found: AssessmentRecord) -> JSONResponse:
    pictured: frozenset[str] = frozenset()
    # The image is on record: an error now would have it sent a second time, for want of a few links.
    with contextlib.suppress(RecordsUnavailable):
        pictured = await services.records.pictured(references_of(found.image))
    answer = assessment_answer(
        found.image,
        lesion_id=found.lesion_id,
        patient_id=found.patient_id,
        pictured=pictured,
        pms_url=services.pms.url,
    )
    headers = {"Location": lesion_url(found.lesion_id), "Cache-Control": "no-store"}
    if found.image.outcome is Outcome.PENDING:
        return JSONResponse(answer, 202, headers | {"Retry-After": _PENDING_RETRY_AFTER})
    answer["open_demand"] = demand_answer(found.open_demand)
    return JSONResponse(answer, 201, headers)


timeline_router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)

_NO_STORE = {"Cache-Control": "no-store"}


@timeline_router.get(
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
    await permit(request, Action.LIST, patient_id=patient_id, access=access)
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


@timeline_router.get(
    "/api/lesions/{lesion_id}",
    response_model=TimelineDocument,
    openapi_extra=rule(Action.READ),
    summary="A lesion's timeline",
)
async def read_lesion(request: Request, caller: Caller, lesion_id: UUID) -> JSONResponse:
    """Every image of a lesion with its assessment, newest first."""
    services: Services = request.app.state.services
    patient_id = (await permit_lesion(request, Action.READ, lesion_id)).patient_id
    timeline = await services.records.timeline(lesion_id)
    if timeline is None:
        raise NotFound
    pictured = await services.records.pictured(references_of(*timeline.images))
    await services.records.record_event(
        _viewed(Action.READ, caller, request.scope["request_id"], patient_id, lesion_id)
    )
    answer = timeline_answer(timeline, pictured=pictured, pms_url=services.pms.url)
    return JSONResponse(answer, headers=_NO_STORE)


@timeline_router.get(
    "/api/lesions/{lesion_id}/images/{image_id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}, "image/png": {}}}},
    openapi_extra=rule(Action.DOWNLOAD),
    summary="The original image, decrypted",
)
async def read_image(request: Request, caller: Caller, lesion_id: UUID, image_id: UUID) -> Response:
    """Answer with the very bytes that were uploaded."""
    services: Services = request.app.state.services
    patient_id = (await permit_lesion(request, Action.DOWNLOAD, lesion_id)).patient_id
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


@timeline_router.post(
    "/api/lesions/{lesion_id}/confirm",
    response_model=ConfirmationDocument,
    openapi_extra=rule(Action.CONFIRM, requestBody=body_of(ConfirmationForm)),
    summary="Confirm that an image is of this lesion",
)
async def confirm_image(request: Request, caller: Caller, lesion_id: UUID) -> JSONResponse:
    """Let an image count as the lesion's own: the next is compared with it. Nothing recorded changes; the first word stands."""
    services: Services = request.app.state.services
    request_id: str = request.scope["request_id"]
    patient_id = (await permit_lesion(request, Action.CONFIRM, lesion_id)).patient_id
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
    patient_id: str | None,
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

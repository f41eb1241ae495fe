"""Lesions: an upload, a patient's list, a timeline, an original image, its confirmation, an answer made again."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response

from serve_app.access.rules import Action, RequestedAction, may
from serve_app.domain.assessment import Outcome, ReferenceFilter
from serve_app.domain.errors import (
    Erased,
    Forbidden,
    IdempotencyMismatch,
    NotFound,
    RecordsUnavailable,
)
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.domain.review import LikeliestLesion
from serve_app.http.access import Caller, permit, permit_lesion, rule
from serve_app.http.bodies import (
    Form,
    Place,
    body_of,
    check_idempotency_key,
    expected_bytes,
    parse_context,
    parse_impression,
    parse_lesion_id,
    read_cursor,
    read_form,
    read_moment,
    read_upload,
    write_cursor,
)
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES, UPLOAD_BODY
from serve_app.http.services import Parts, Services
from serve_app.http.similar import Confirmed, Licences, TopK
from serve_app.lesions.replay import ReplayDocument
from serve_app.lesions.triage import Submission, read_original
from serve_app.records.answers import (
    AssessmentDocument,
    ConfirmationDocument,
    LesionListDocument,
    LesionSummaryDocument,
    TimelineDocument,
    assessment_document,
    lesion_url,
    references_of,
    timeline_document,
)
from serve_app.records.lesion_rows import AssessmentRecord, ImageRecord, PatientAccess, Replay

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)

#: Seconds until a pending assessment is worth asking for again: recovery's own rhythm.
_PENDING_RETRY_AFTER = "5"


@router.post(
    "/api/lesions",
    status_code=201,
    response_model=AssessmentDocument,
    responses={202: {"model": AssessmentDocument}},
    openapi_extra=rule(Action.UPLOAD, requestBody=UPLOAD_BODY),
    summary="Assess a dermoscopic image",
)
async def create_lesion(
    request: Request,
    requested: Caller,
    services: Parts,
    *,
    top_k: TopK = 10,
    licence: Licences = None,
    confirmed: Confirmed = False,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> JSONResponse:
    """Assess one image: 201 with the answer, or 202 when it is stored and the answer follows."""
    shown = ReferenceFilter(licences=tuple(licence or ()), confirmed_only=confirmed)
    size = expected_bytes(request, max_image_bytes=services.settings.max_upload_bytes)
    with services.admission.enter(size) as place:
        submission = await _read_submission(
            request, services, requested, place, shown, top_k, idempotency_key
        )
        stored: AssessmentRecord | Replay | None = None
        if idempotency_key is not None:
            stored = await services.records.find_replay(submission.actor, idempotency_key)
        if stored is None:
            stored = await services.triage.submit(submission, await services.live.current())
        if isinstance(stored, Replay):
            requested.recorded = False  # where another request was faster, the event was not written, either
            stored = await _find_again(services, stored, submission, requested)
    pictured: frozenset[str] = frozenset()
    # The image is on record: an error now would have it sent a second time, for want of a few links.
    with contextlib.suppress(RecordsUnavailable):
        pictured = await services.records.pictured(references_of(stored.image))
    document = assessment_document(stored.image, stored, pictured=pictured, pms_url=services.settings.pms_url)
    headers = NO_STORE | {"Location": lesion_url(stored.lesion_id)}
    if stored.image.outcome is Outcome.PENDING:
        return JSONResponse(document.answer(), 202, headers | {"Retry-After": _PENDING_RETRY_AFTER})
    document.open_demand = stored.open_demand
    if submission.lesion_id is None:
        with contextlib.suppress(RecordsUnavailable):
            if (likeliest := await _likeliest(services, stored.image)) is not None:
                document.likeliest_lesion = likeliest
    return JSONResponse(document.answer(), 201, headers)


async def _likeliest(services: Services, image: ImageRecord) -> LikeliestLesion | None:
    """The earlier lesion that a new one is likeliest to be, if it is any; it is the same patient's, whom the caller may see."""
    if image.assessment is None:
        return None
    space = image.assessment.provenance.embedding_space
    return await services.records.likeliest(image.lesion_id, embedding_space=space)


async def _read_submission(
    request: Request,
    services: Services,
    requested: RequestedAction,
    place: Place,
    shown: ReferenceFilter,
    top_k: int,
    idempotency_key: str | None,
) -> Submission:
    """Read the body, and decide access before any other field is judged: a stranger learns nothing but `forbidden`."""
    check_idempotency_key(idempotency_key)
    form = await read_upload(request, place, max_image_bytes=services.settings.max_upload_bytes)
    requested.patient_id = form.patient_id
    sent_lesion, encounter = form.values.get("lesion_id"), form.values.get("encounter_id")
    lesion_id = parse_lesion_id(sent_lesion) if sent_lesion else None
    access = await services.records.access(requested.actor, form.patient_id, lesion_id)
    await permit(services, requested, access, form.patient_id)
    if lesion_id is not None and access.lesion_patient != form.patient_id:
        raise NotFound("lesion_id: this patient has no such lesion.")
    sent_impression = form.values.get("impression")
    if sent_impression:
        await _permit_impression(services, requested, access)
    # What beside the form may change the answer; as before `confirmed` could be asked for when it is not.
    asked = (str(top_k), *sorted(shown.licences), *(("confirmed",) if shown.confirmed_only else ()))
    return Submission(
        actor=requested.actor,
        request_id=requested.request_id,
        patient_id=form.patient_id,
        encounter_id=parse_opaque_id("encounter_id", encounter) if encounter else None,
        lesion_id=lesion_id,
        image=form.image,
        context=parse_context(form.values),
        impression=parse_impression(sent_impression),
        top_k=top_k,
        reference_filter=shown,
        idempotency_key=idempotency_key,
        # Megabytes, so in a thread.
        request_sha256=None if idempotency_key is None else await asyncio.to_thread(form.fingerprint, *asked),
    )


async def _permit_impression(services: Services, requested: RequestedAction, access: PatientAccess) -> None:
    """Permit an impression to whom a review is: it is a clinician's own, and no account of the PMS has one."""
    decision = may(requested.principal, Action.REVIEW, assigned=access.assigned, emergency=access.emergency)
    if not decision:
        await services.records.record_event(requested.event("denied", reason=decision.reason))
        raise Forbidden("impression: only a clinician's own token may send one.")


async def _find_again(
    services: Services, replay: Replay, submission: Submission, requested: RequestedAction
) -> AssessmentRecord:
    """Find what a repeated request led to: it adds nothing to that, and is on record as a look at it."""
    if replay.request_sha256 != submission.request_sha256:
        raise IdempotencyMismatch
    found = await services.records.assessment_record(replay.assessment_id)
    if found is None:
        raise NotFound
    if found.image.erasure is not None:
        raise Erased
    looked = replace(
        requested,
        action=Action.READ,
        lesion_id=found.lesion_id,
        image_id=found.image.image_id,
        assessment_id=replay.assessment_id,
    )
    await services.records.record_event(looked.event("success", repeated=Action.UPLOAD))
    return found


@router.get(
    "/api/lesions",
    response_model=LesionListDocument,
    openapi_extra=rule(Action.LIST),
    summary="A patient's lesions, newest first",
)
async def list_lesions(
    requested: Caller,
    services: Parts,
    patient_id: Annotated[str, Query()],
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
) -> JSONResponse:
    """List lesions; `next` is the cursor of the following page, null on the last."""
    patient_id = parse_opaque_id("patient_id", patient_id)
    after = read_cursor(cursor, read_moment, UUID) if cursor else None
    access = await services.records.access(requested.actor, patient_id)
    await permit(services, requested, access, patient_id)
    found = await services.records.patient_lesions(patient_id, limit=limit + 1, cursor=after)
    await services.records.record_event(requested.event("success"))
    page = found[:limit]
    last = write_cursor(page[-1].created_at, page[-1].lesion_id) if len(found) > limit else None
    lesions = [LesionSummaryDocument.model_validate(summary) for summary in page]
    document = LesionListDocument(lesions=lesions, next=last)
    return JSONResponse(document.answer(), headers=NO_STORE)


@router.get(
    "/api/lesions/{lesion_id}",
    response_model=TimelineDocument,
    openapi_extra=rule(Action.READ),
    summary="A lesion's timeline",
)
async def read_lesion(requested: Caller, services: Parts, lesion_id: UUID) -> JSONResponse:
    """Every image of a lesion with its assessment and what was said of it, newest first; and what the lesion turned out to be."""
    await permit_lesion(services, requested, lesion_id)
    timeline = await services.records.timeline(lesion_id)
    if timeline is None:
        raise NotFound
    pictured = await services.records.pictured(references_of(*timeline.images))
    told = await services.hook_records.feedback(lesion_id)
    likeliest = await _likeliest(services, timeline.latest) if timeline.is_new else None
    await services.records.record_event(requested.event("success"))
    document = timeline_document(timeline, pictured=pictured, pms_url=services.settings.pms_url)
    if likeliest is not None:
        document.likeliest_lesion = likeliest
    if told:
        document.hook_feedback = told
    return JSONResponse(document.answer(), headers=NO_STORE)


@router.get(
    "/api/lesions/{lesion_id}/images/{image_id}",
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}, "image/png": {}}}},
    openapi_extra=rule(Action.DOWNLOAD),
    summary="The original image, decrypted",
)
async def read_image(requested: Caller, services: Parts, lesion_id: UUID, image_id: UUID) -> Response:
    """Answer with the very bytes that were uploaded."""
    await permit_lesion(services, requested, lesion_id)
    requested.image_id = image_id
    image, media_type = await read_original(services.records, services.keys, lesion_id, image_id)
    await services.records.record_event(requested.event("success"))
    headers = NO_STORE | {"X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
    return Response(image, media_type=media_type, headers=headers)


class ConfirmationForm(Form):
    """Which image is of the lesion."""

    image_id: UUID


@router.post(
    "/api/lesions/{lesion_id}/confirm",
    response_model=ConfirmationDocument,
    openapi_extra=rule(Action.CONFIRM, requestBody=body_of(ConfirmationForm)),
    summary="Confirm that an image is of this lesion",
)
async def confirm_image(
    request: Request, requested: Caller, services: Parts, lesion_id: UUID
) -> JSONResponse:
    """Let an image count as the lesion's own: the next is compared with it. Nothing recorded changes; the first word stands."""
    await permit_lesion(services, requested, lesion_id)
    image_id = requested.image_id = (await read_form(request, ConfirmationForm)).image_id
    event = requested.event("success")
    try:
        identity = await services.records.confirm(
            lesion_id, image_id, confirmed_by=requested.actor, event=event
        )
    except (NotFound, Erased):
        requested.recorded = False  # nothing was written, the event neither
        raise
    document = ConfirmationDocument(lesion_id=lesion_id, image_id=image_id, identity=identity)
    return JSONResponse(document.answer(), headers=NO_STORE)


@router.post(
    "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay",
    response_model=ReplayDocument,
    openapi_extra=rule(Action.REPLAY),
    summary="Make a past answer again, and compare",
)
async def replay_assessment(
    requested: Caller, services: Parts, lesion_id: UUID, assessment_id: UUID
) -> JSONResponse:
    """Recompute an answer from the sealed image on the recorded versions; nothing is stored but the audit."""
    await permit_lesion(services, requested, lesion_id)
    requested.assessment_id = assessment_id
    case = await services.records.recorded_case(lesion_id, assessment_id)
    if case is None:
        raise NotFound
    requested.image_id = case.image_id
    # A replay costs what an upload costs, and takes one's place.
    with services.admission.enter(case.sealed_bytes):
        document = await services.replayer.replay(case)
    cause = {"cause": document.cause.code} if document.cause else {}
    await services.records.record_event(requested.event("success", verdict=document.verdict, **cause))
    return JSONResponse(document.answer(), headers=NO_STORE)

"""POST /api/lesions: an image comes in, an assessment goes out."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
import re
from typing import Annotated

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse

from serve_app.api.admission import Place
from serve_app.api.answers import assessment_answer, demand_answer, lesion_url, references_of
from serve_app.api.authentication import Caller
from serve_app.api.openapi import PROBLEM_RESPONSES, UPLOAD_BODY, AssessmentDocument
from serve_app.api.permission import require
from serve_app.api.reference_query import Confirmed, Licences, TopK
from serve_app.api.rules import rule
from serve_app.api.services import Services
from serve_app.api.triage import Submission
from serve_app.api.upload import (
    UploadForm,
    expected_bytes,
    parse_context,
    parse_lesion_id,
    read_upload,
)
from serve_app.domain.assessment import Outcome
from serve_app.domain.errors import (
    Erased,
    IdempotencyMismatch,
    InvalidField,
    NotFound,
    RecordsUnavailable,
    RejectedUpload,
)
from serve_app.domain.identifiers import parse_opaque_id
from serve_app.domain.reference_filter import ReferenceFilter
from serve_app.records.lesion_rows import AssessmentRecord, Replay
from serve_app.security.access import Action
from serve_app.security.audit import AuditEvent
from serve_app.security.tokens import Principal

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
        submission = await _authorise(services, caller, form, request_id, question)
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
    services: Services,
    caller: Principal,
    form: UploadForm,
    request_id: str,
    question: _Question,
) -> Submission:
    """Decide access before any other field is judged: a stranger learns nothing but `forbidden`."""
    sent_lesion = form.values.get("lesion_id")
    lesion_id = parse_lesion_id(sent_lesion) if sent_lesion else None
    access = await services.records.access(caller.subject, form.patient_id, lesion_id)
    await require(
        services.records,
        caller,
        Action.UPLOAD,
        patient_id=form.patient_id,
        access=access,
        request_id=request_id,
    )
    if lesion_id is not None and access.lesion_patient != form.patient_id:
        raise NotFound("lesion_id: this patient has no such lesion.")
    encounter = form.values.get("encounter_id")
    return Submission(
        actor=caller.subject,
        request_id=request_id,
        patient_id=form.patient_id,
        encounter_id=parse_opaque_id("encounter_id", encounter) if encounter else None,
        lesion_id=lesion_id,
        image=form.image,
        context=parse_context(form.values),
        top_k=question.top_k,
        reference_filter=question.reference_filter,
        idempotency_key=question.idempotency_key,
        request_sha256=form.fingerprint(*question.words()),
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

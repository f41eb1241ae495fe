"""GET /api/lesions/{lesion_id}/images/{image_id}/similar: confirmed cases like an image, under any filter."""

from __future__ import annotations

from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.api.answers import references_of, similar_answer
from serve_app.api.authentication import Caller
from serve_app.api.openapi import PROBLEM_RESPONSES, SimilarCasesDocument
from serve_app.api.permission import require_lesion
from serve_app.api.reference_query import Confirmed, Diagnoses, Licences, Sites, TopK
from serve_app.api.rules import rule
from serve_app.api.services import Services
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, Erased, NotFound, StageFailed
from serve_app.domain.reference_filter import ReferenceFilter
from serve_app.security.access import Action
from serve_app.security.audit import AuditEvent, AuditOutcome

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)

#: What the audit log calls this, beside `read`.
_SEARCH = "similar"


@router.get(
    "/api/lesions/{lesion_id}/images/{image_id}/similar",
    response_model=SimilarCasesDocument,
    openapi_extra=rule(Action.READ),
    summary="The confirmed cases most similar to an image",
)
async def find_similar(
    request: Request,
    caller: Caller,
    lesion_id: UUID,
    image_id: UUID,
    *,
    top_k: TopK = 10,
    licence: Licences = None,
    diagnosis: Diagnoses = None,
    anatom_site_general: Sites = None,
    confirmed: Confirmed = False,
) -> JSONResponse:
    """Search again with an assessed image, in the space it was assessed in; its assessment stays as it is."""
    services: Services = request.app.state.services
    request_id: str = request.scope["request_id"]
    reference_filter = ReferenceFilter(
        # Each once: the caller may repeat a value as often as a URL is long.
        licences=tuple(dict.fromkeys(licence or ())),
        sites=tuple(dict.fromkeys(anatom_site_general or ())),
        confirmed_only=confirmed,
        diagnoses=tuple(dict.fromkeys(map(Diagnosis, diagnosis or ()))),
    )
    patient_id = await require_lesion(
        services.records, caller, Action.READ, lesion_id=lesion_id, request_id=request_id
    )

    def event(outcome: AuditOutcome, **detail: object) -> AuditEvent:
        return AuditEvent(
            action=Action.READ,
            actor=caller.subject,
            outcome=outcome,
            patient_id=patient_id,
            lesion_id=lesion_id,
            image_id=image_id,
            request_id=request_id,
            # Not what was asked for: which diagnosis is thought of says something of the patient.
            detail={"search": _SEARCH, **detail},
        )

    try:
        # Searches take places of uploads: a flood of them must not find the retriever before an image does.
        with services.admission.enter(0):
            found = await services.searcher.search(
                lesion_id, image_id, k=top_k, reference_filter=reference_filter
            )
    except (NotFound, Erased, Conflict, StageFailed) as failure:
        await services.records.record_event(event("failed", code=failure.code))
        raise
    pictured = await services.records.pictured(references_of(found.neighbours))
    await services.records.record_event(event("success"))
    return JSONResponse(
        similar_answer(
            found.neighbours,
            lesion_id=lesion_id,
            image_id=image_id,
            embedding_space=found.embedding_space,
            pictured=pictured,
        ),
        headers={"Cache-Control": "no-store"},
    )

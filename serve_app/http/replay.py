"""POST /api/lesions/{lesion_id}/assessments/{assessment_id}/replay: a past answer, made again."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.audit.events import AuditEvent
from serve_app.domain.assessment import Provenance
from serve_app.domain.errors import IntegrityError, NotFound, StageFailed
from serve_app.http.access import rule
from serve_app.http.caller import Caller, permit_lesion
from serve_app.http.documents import PROBLEM_RESPONSES, ReplayDocument
from serve_app.http.services import Services
from serve_app.lesions.replay import SCORE_TOLERANCE, TOLERANCE, Replayed
from serve_app.records.lesion_rows import RecordedCase

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)

_REFERENCES_CHANGED = {
    "field": "similar",
    "code": "references_changed",
    "message": "The most similar references are others than then; the risk was drawn from the recorded ones.",
}


@router.post(
    "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay",
    response_model=ReplayDocument,
    openapi_extra=rule(Action.REPLAY),
    summary="Make a past answer again, and compare",
)
async def replay_assessment(
    request: Request, caller: Caller, lesion_id: UUID, assessment_id: UUID
) -> JSONResponse:
    """Recompute an answer from the sealed image on the recorded versions; nothing is stored but the audit."""
    services: Services = request.app.state.services
    request_id: str = request.scope["request_id"]
    patient_id = (await permit_lesion(request, Action.REPLAY, lesion_id)).patient_id
    case = await services.records.recorded_case(lesion_id, assessment_id)

    def event(outcome: Any, **detail: object) -> AuditEvent:  # noqa: ANN401
        return AuditEvent(
            action=Action.REPLAY,
            actor=caller.subject,
            outcome=outcome,
            patient_id=patient_id,
            lesion_id=lesion_id,
            image_id=case.image_id if case else None,
            assessment_id=assessment_id,
            request_id=request_id,
            detail=detail,
        )

    try:
        replayed = await _replay(services, case)
    except (NotFound, StageFailed, IntegrityError) as failure:
        await services.records.record_event(event("failed", code=failure.code))
        raise
    detail = {"verdict": replayed.verdict} | ({"cause": replayed.cause} if replayed.cause else {})
    await services.records.record_event(event("success", **detail))
    return JSONResponse(_answer(assessment_id, replayed), headers={"Cache-Control": "no-store"})


async def _replay(services: Services, case: RecordedCase | None) -> Replayed:
    if case is None:
        raise NotFound
    # A replay costs what an upload costs, and takes one's place.
    with services.admission.enter(case.sealed_bytes):
        return await services.replayer.replay(case)


def _answer(assessment_id: UUID, replayed: Replayed) -> dict[str, Any]:
    cause = replayed.cause
    return {
        "assessment_id": str(assessment_id),
        "verdict": replayed.verdict,
        "cause": {"code": cause, "message": cause.message} if cause else None,
        "tolerance": {"probability": TOLERANCE, "score": SCORE_TOLERANCE},
        "differences": [asdict(difference) for difference in replayed.differences],
        "notes": [_REFERENCES_CHANGED] if replayed.references_changed else [],
        "provenance": {
            "recorded": _provenance(replayed.recorded),
            "current": _provenance(replayed.current),
        },
    }


def _provenance(provenance: Provenance | None) -> dict[str, Any] | None:
    return None if provenance is None else asdict(provenance)

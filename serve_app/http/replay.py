"""POST /api/lesions/{lesion_id}/assessments/{assessment_id}/replay: a past answer, made again."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.domain.assessment import Id, Provenance, one_of
from serve_app.domain.errors import NotFound
from serve_app.http.access import Caller, permit_lesion, rule
from serve_app.http.documents import PROBLEM_RESPONSES
from serve_app.http.services import Services
from serve_app.lesions.replay import SCORE_TOLERANCE, TOLERANCE, Cause, Difference, Verdict
from serve_app.records.answers import Document

router = APIRouter(tags=["lesions"], responses=PROBLEM_RESPONSES)


class ReplayCauseDocument(Document):
    """Why an assessment could not be replayed; `code` is stable, `message` is for people."""

    code: Annotated[Cause, one_of(Cause, "Code")]
    message: str


class ReplayToleranceDocument(Document):
    """How far two numbers may be apart and still count as the same, absolutely; the score is rounded."""

    probability: float
    score: float


class ReplayNoteDocument(Document):
    """Something that is other than then without being a difference of the answer."""

    field: Literal["similar"]
    code: Literal["references_changed"]
    message: str


class ReplayProvenanceDocument(Document):
    """What made the recorded answer, and the one made again; null where there is none."""

    recorded: Provenance | None
    current: Provenance | None


class ReplayDocument(Document):
    """A past answer, made again: `cannot` has a cause, `within_tolerance` and `differs` have differences."""

    assessment_id: Id
    verdict: Annotated[Verdict, one_of(Verdict, "Verdict")]
    cause: ReplayCauseDocument | None
    tolerance: ReplayToleranceDocument
    differences: list[Difference]
    notes: list[ReplayNoteDocument]
    provenance: ReplayProvenanceDocument


_REFERENCES_CHANGED = ReplayNoteDocument(
    field="similar",
    code="references_changed",
    message="The most similar references are others than then; the risk was drawn from the recorded ones.",
)


@router.post(
    "/api/lesions/{lesion_id}/assessments/{assessment_id}/replay",
    response_model=ReplayDocument,
    openapi_extra=rule(Action.REPLAY),
    summary="Make a past answer again, and compare",
)
async def replay_assessment(
    request: Request, _: Caller, lesion_id: UUID, assessment_id: UUID
) -> JSONResponse:
    """Recompute an answer from the sealed image on the recorded versions; nothing is stored but the audit."""
    services: Services = request.app.state.services
    requested = await permit_lesion(request, Action.REPLAY, lesion_id)
    requested.assessment_id = assessment_id
    case = await services.records.recorded_case(lesion_id, assessment_id)
    if case is None:
        raise NotFound
    requested.image_id = case.image_id
    # A replay costs what an upload costs, and takes one's place.
    with services.admission.enter(case.sealed_bytes):
        replayed = await services.replayer.replay(case)
    cause = replayed.cause
    detail = {"verdict": replayed.verdict} | ({"cause": cause} if cause else {})
    await services.records.record_event(requested.event("success", **detail))
    document = ReplayDocument(
        assessment_id=assessment_id,
        verdict=replayed.verdict,
        cause=ReplayCauseDocument(code=cause, message=cause.message) if cause else None,
        tolerance=ReplayToleranceDocument(probability=TOLERANCE, score=SCORE_TOLERANCE),
        differences=list(replayed.differences),
        notes=[_REFERENCES_CHANGED] if replayed.references_changed else [],
        provenance=ReplayProvenanceDocument(recorded=replayed.recorded, current=replayed.current),
    )
    return JSONResponse(document.answer(), headers={"Cache-Control": "no-store"})

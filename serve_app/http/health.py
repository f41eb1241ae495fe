"""Liveness and readiness: the two anonymous routes, and the OpenAPI document for those with a token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.http.access import Caller, is_this_machines, rule
from serve_app.http.services import Parts

router = APIRouter()


@router.get("/healthz", tags=["health"], summary="The process answers")
async def healthz() -> dict[str, str]:
    """Say that the process answers; touches nothing else."""
    return {"status": "ok"}


@router.get("/readyz", tags=["health"], summary="The database answers and a model is live")
async def readyz(request: Request, services: Parts) -> JSONResponse:
    """Ask the database which model is live, once a second at most; RecordsUnavailable (503) when it does not answer.

    Anyone may ask. More than `status` is told to whoever asks on this machine, and to an operator's token; any other
    token is refused as everywhere. Reported then, without deciding: `refused_model`, why a model that was published does not answer
    (null otherwise), the invariants of what is stored, whether the audit log is what was signed, how many
    assessments are pending or have failed, how many messages to the PMS wait or are dead, how each background
    loop fares, with a finding for one that keeps ending, for events that are not sealed, for messages that name another
    patient's encounter and for measures that have drifted, and why retention waits (null: it does not).
    """
    told = is_this_machines(request)
    if not told and "authorization" in request.headers:
        await services.authenticator.admit(request, Action.OBSERVE)
        told = True
    found = await services.readiness()
    return JSONResponse(dict(found) if told else {"status": found["status"]})


@router.get("/api/openapi.json", include_in_schema=False, openapi_extra=rule(Action.DESCRIBE))
async def openapi(request: Request, _: Caller) -> dict[str, Any]:
    """Describe the interface."""
    document: dict[str, Any] = request.app.openapi()
    return document

"""Liveness and readiness: the two anonymous routes, and the OpenAPI document for those with a token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from serve_app.access.rules import Action
from serve_app.http.access import Caller, rule
from serve_app.http.services import Parts
from serve_app.records.serving import live_model

router = APIRouter()


@router.get("/healthz", tags=["health"], summary="The process answers")
async def healthz() -> dict[str, str]:
    """Say that the process answers; touches nothing else."""
    return {"status": "ok"}


@router.get("/readyz", tags=["health"], summary="The database answers and a model is live")
async def readyz(services: Parts) -> JSONResponse:
    """Ask the database which model is live; RecordsUnavailable (503) when it does not answer.

    Reported beside it, without deciding: `refused_model`, why a model that was published does not answer
    (null otherwise), the invariants of what is stored, whether the audit log is what was signed, how many
    assessments are pending or have failed, how many messages to the PMS wait or are dead, and how each background
    loop fares, with a finding for one that keeps ending and one for messages that name another patient's encounter.
    """
    await live_model(services.pool)
    live = await services.live.current()
    counts = await services.counts()
    findings = services.worker.findings()
    if (outbox := counts["outbox"]) and (wrong := outbox["wrong_encounter"]):
        findings.append(
            f"{wrong} answers name another patient's encounter and were not sent: `derm-cds outbox list --dead`"
        )
    return JSONResponse(
        {
            "status": "ready",
            "model_id": live.model_id,
            "embedding_space": live.embedding_space,
            "refused_model": services.live.refused,
            "invariants": services.invariants.describe(),
            "audit": services.sealer.describe(),
            "loops": services.worker.describe(),
            "findings": findings,
            **counts,
        }
    )


@router.get("/api/openapi.json", include_in_schema=False, openapi_extra=rule(Action.DESCRIBE))
async def openapi(request: Request, _: Caller) -> dict[str, Any]:
    """Describe the interface."""
    document: dict[str, Any] = request.app.openapi()
    return document

"""The caller of a request: who asks, and whether the patient is theirs."""

from __future__ import annotations

from collections import Counter
import re
from typing import Annotated, Any
from uuid import UUID

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer

from serve_app.access.rules import Action, Circumstances, may, requested_action
from serve_app.access.tokens import Principal
from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import Forbidden, NotFound
from serve_app.http.services import Services
from serve_app.records.lesion_rows import PatientAccess
from serve_app.records.lesions import LesionStore

#: For the document alone: what counts as a bearer token is decided by the Authenticator.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> Principal:
    """Verify `Authorization: Bearer <JWT>`, and that the route is for this principal at all.

    Raises Unauthenticated, RateLimited or Forbidden; each is in the audit log. RequestValidationError for a query
    parameter that the route does not have, or takes once and was sent twice: none is ever ignored.
    """
    services: Services = request.app.state.services
    principal = await services.authenticator.admit(request)
    _judge_query(request)
    return principal


def _judge_query(request: Request) -> None:
    sent = Counter(name for name, _ in request.query_params.multi_items())
    known = (
        {parameter["name"]: parameter["schema"] for parameter in _query_parameters(request)} if sent else {}
    )
    for name, times in sent.items():
        if name not in known:
            # Named only where it is a word: it may be anything that a caller knows.
            word = f" {name}" if _WORD.fullmatch(name) else ""
            takes = ", ".join(known) or "none"
            fault = {"loc": ("query",), "msg": f"no such parameter{word}; this route takes {takes}"}
            raise RequestValidationError([fault])
        kinds = known[name].get("anyOf", [known[name]])
        if times > 1 and not any(kind.get("type") == "array" for kind in kinds):
            raise RequestValidationError([{"loc": ("query", name), "msg": "sent twice"}])


def _query_parameters(request: Request) -> list[dict[str, Any]]:
    """What the OpenAPI document says that the query of the chosen route may hold."""
    path = request.app.openapi()["paths"].get(request.scope["route"].path, {})
    parameters = path.get(request.method.lower(), {}).get("parameters", [])
    return [parameter for parameter in parameters if parameter["in"] == "query"]


Caller = Annotated[Principal, Depends(authenticate)]


async def require(
    records: LesionStore,
    principal: Principal,
    action: Action,
    *,
    patient_id: str | None,
    access: PatientAccess,
    request_id: str,
    lesion_id: UUID | None = None,
) -> None:
    """Return if the principal may do this for the patient; else record the denial and raise Forbidden.

    The caller reads the same words whether the patient is another's or does not exist. What rests
    on an emergency access is marked so from here on, in every event of the request.
    """
    decision = may(principal, action, Circumstances(assigned=access.assigned, emergency=access.emergency))
    attempt = requested_action(request_id)
    if attempt is not None:
        attempt.patient_id, attempt.lesion_id = patient_id, lesion_id
        attempt.emergency = decision.emergency
    if decision:
        return
    await records.record_event(
        AuditEvent(
            action=action,
            actor=principal.subject,
            outcome="denied",
            patient_id=patient_id,
            lesion_id=lesion_id,
            request_id=request_id,
            detail={"reason": decision.reason},
        )
    )
    raise Forbidden


async def require_lesion(
    records: LesionStore, principal: Principal, action: Action, *, lesion_id: UUID, request_id: str
) -> str:
    """Permit access to a lesion by its patient, and name that.

    An unknown lesion is denied like a stranger's: Forbidden, and on record. Only who may do this
    for any patient learns that it is unknown: NotFound.
    """
    access = await records.access(principal.subject, None, lesion_id)
    await require(
        records,
        principal,
        action,
        patient_id=access.lesion_patient,
        access=access,
        request_id=request_id,
        lesion_id=lesion_id,
    )
    if access.lesion_patient is None:
        raise NotFound
    return access.lesion_patient

"""The caller of a request: who asks, what for, and whether the patient is theirs."""

from __future__ import annotations

from collections import Counter
import re
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer

from serve_app.access.rules import Action, Circumstances, RequestedAction, may
from serve_app.access.tokens import Principal
from serve_app.domain.errors import Forbidden, NotFound
from serve_app.http.services import Services
from serve_app.records.lesion_rows import PatientAccess

#: For the document alone: what counts as a bearer token is for the Authenticator to say.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> Principal:
    """Verify `Authorization: Bearer <JWT>`, and that the route is for this principal at all.

    Raises Unauthenticated, RateLimited or Forbidden; each is in the audit log. RequestValidationError for a query
    parameter that the route does not have, or takes once and was sent twice: none is ever ignored.
    """
    services: Services = request.app.state.services
    principal = await services.authenticator.admit(request)
    if request.query_params:
        _judge_query(request)
    return principal


def _judge_query(request: Request) -> None:
    operation = (
        request.app.openapi()["paths"].get(request.scope["route"].path, {}).get(request.method.lower(), {})
    )
    known = {
        found["name"]: found["schema"] for found in operation.get("parameters", []) if found["in"] == "query"
    }
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            # Named only where it is a word: it may be anything that a caller knows.
            word = f" {name}" if _WORD.fullmatch(name) else ""
            takes = ", ".join(known) or "none"
            fault = {"loc": ("query",), "msg": f"no such parameter{word}; this route takes {takes}"}
            raise RequestValidationError([fault])
        kinds = known[name].get("anyOf", [known[name]])
        if times > 1 and not any(kind.get("type") == "array" for kind in kinds):
            raise RequestValidationError([{"loc": ("query", name), "msg": "sent twice"}])


Caller = Annotated[Principal, Depends(authenticate)]


async def permit(
    request: Request,
    action: Action,
    *,
    patient_id: str | None,
    access: PatientAccess,
    lesion_id: UUID | None = None,
) -> RequestedAction:
    """Permit a request for a patient, or record the denial and raise Forbidden.

    The caller reads the same words whether the patient is another's or does not exist. Returns what events of the
    request are made with; what rests on an emergency access is marked so in all of them.
    """
    services: Services = request.app.state.services
    requested: RequestedAction = request.state.requested
    circumstances = Circumstances(assigned=access.assigned, emergency=access.emergency)
    decision = may(requested.principal, action, circumstances)
    requested.patient_id, requested.lesion_id = patient_id, lesion_id
    requested.emergency = decision.emergency
    if not decision:
        await services.records.record_event(requested.event("denied", reason=decision.reason))
        raise Forbidden
    return requested


async def permit_lesion(request: Request, action: Action, lesion_id: UUID) -> RequestedAction:
    """Permit a request for a lesion by its patient, as `permit` does.

    An unknown lesion is denied like a stranger's: Forbidden, and on record. Only who may do this
    for any patient learns that it is unknown: NotFound.
    """
    services: Services = request.app.state.services
    requested: RequestedAction = request.state.requested
    access = await services.records.access(requested.principal.subject, None, lesion_id)
    await permit(request, action, patient_id=access.lesion_patient, access=access, lesion_id=lesion_id)
    if access.lesion_patient is None:
        raise NotFound
    return requested

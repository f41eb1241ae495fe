"""Who is asking: the bearer token of a request, checked at the door."""

from __future__ import annotations

from collections import Counter
import re
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer

from serve_app.api.services import Services
from serve_app.security.tokens import Principal

#: For the document alone: what counts as a bearer token is decided at the door.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> Principal:
    """Verify `Authorization: Bearer <JWT>`, and that the route is for this principal at all.

    Raises Unauthenticated, RateLimited or Forbidden; each is in the audit log. RequestValidationError for a query
    parameter that the route does not have, or takes once and was sent twice: none is ever ignored.
    """
    services: Services = request.app.state.services
    principal = await services.door.admit(request)
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

"""Who is asking: the bearer token of a request, checked at the door."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from serve_app.api.services import Services
from serve_app.security.tokens import Principal

#: For the document alone: what counts as a bearer token is decided at the door.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> Principal:
    """Verify `Authorization: Bearer <JWT>`, and that the route is for this principal at all.

    Raises Unauthenticated, RateLimited or Forbidden; each is in the audit log.
    """
    services: Services = request.app.state.services
    return await services.door.admit(request)


Caller = Annotated[Principal, Depends(authenticate)]

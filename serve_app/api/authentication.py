"""Who is asking: the bearer token of a request."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from serve_app.domain.errors import Unauthenticated
from serve_app.security.tokens import Principal, TokenVerifier

#: For the document alone: what counts as a bearer token is decided here.
_DOCUMENTED = HTTPBearer(scheme_name="bearer", bearerFormat="JWT", auto_error=False)


async def authenticate(request: Request, _: Annotated[object, Depends(_DOCUMENTED)]) -> Principal:
    """Verify `Authorization: Bearer <JWT>`; raise Unauthenticated for anything else."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated
    verifier: TokenVerifier = request.app.state.token_verifier
    return verifier.verify(token.strip())


Caller = Annotated[Principal, Depends(authenticate)]

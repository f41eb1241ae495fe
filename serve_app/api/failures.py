"""What fails is in the audit log: once, in whichever route, unless the route has recorded it itself."""

from __future__ import annotations

import contextlib
from uuid import UUID

from fastapi import Request

from serve_app.api.services import Services
from serve_app.domain.errors import Conflict, DermError, Overloaded, RecordsUnavailable
from serve_app.security.access import RequestedAction

#: Refused before anything was looked at, or there is no log to write to; the caller tries again.
_UNRECORDED = (Overloaded, RecordsUnavailable)


async def record_failure(request: Request, error: DermError) -> DermError:
    """Record an error of a request whose caller is known; returns what to answer.

    That is the error itself, or RecordsUnavailable when it cannot be recorded: what is not in the
    log is not answered.
    """
    attempt = _attempt(request)
    if attempt is None or isinstance(error, _UNRECORDED):
        return error
    # A constraint that refused a statement took the event with it that was to be written along.
    undone = type(error) is Conflict
    if attempt.recorded and not undone:
        return error
    services: Services = request.app.state.services
    try:
        await services.records.record_event(attempt.event("failed", code=error.code))
    except DermError as unrecorded:
        return unrecorded
    return error


async def record_defect(request: Request) -> None:
    """Record a request in which the service itself failed; the log may be what has failed."""
    attempt = _attempt(request)
    if attempt is not None and not attempt.recorded:
        services: Services = request.app.state.services
        with contextlib.suppress(DermError):
            await services.records.record_event(attempt.event("failed", code="internal"))


async def record_fault(request: Request) -> None:
    """Record a request whose parameters say nothing, up to a bound for each caller."""
    attempt = _attempt(request)
    if attempt is not None and not attempt.recorded:
        services: Services = request.app.state.services
        await services.door.record_fault(attempt, "invalid_field")


def _attempt(request: Request) -> RequestedAction | None:
    attempt: RequestedAction | None = getattr(request.state, "attempt", None)
    if attempt is not None:
        for name in ("lesion_id", "image_id", "assessment_id"):
            if getattr(attempt, name) is None:
                setattr(attempt, name, _id(request.path_params.get(name)))
    return attempt


def _id(value: object) -> UUID | None:
    if isinstance(value, UUID):
        return value
    try:
        return UUID(str(value))
    except ValueError:
        return None

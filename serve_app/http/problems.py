"""Every error in the one problem shape, and on record: once, in whichever route, unless the route has recorded it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from http import HTTPStatus
import logging
from uuid import UUID

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve_app.access.rules import RequestedAction
from serve_app.domain.errors import Conflict, DermError, Overloaded, RecordsUnavailable
from serve_app.http.services import Services

logger = logging.getLogger("derm.api")

CONTENT_TYPE = "application/problem+json"

#: Refused before anything was looked at, or there is no log to write to; the caller tries again.
_UNRECORDED = (Overloaded, RecordsUnavailable)

#: Codes for what the framework itself answers.
_FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed"}


def _unrecorded(request: Request) -> RequestedAction | None:
    """What a request asked for, with the ids of its path; None where nobody asked, or an event says how it ended."""
    requested: RequestedAction | None = getattr(request.state, "requested", None)
    if requested is None or requested.recorded:
        return None
    for name in ("lesion_id", "image_id", "assessment_id"):
        if getattr(requested, name) is None:
            with contextlib.suppress(ValueError):
                setattr(requested, name, UUID(request.path_params.get(name, "")))
    return requested


async def record_failure(request: Request, error: DermError) -> DermError:
    """Record an error of a request whose caller is known; returns what to answer.

    That is the error itself, or RecordsUnavailable when it cannot be recorded: what is not in the
    log is not answered.
    """
    if type(error) is Conflict and (conflicting := getattr(request.state, "requested", None)):
        # A constraint that refused a statement took the event with it that was to be written along.
        conflicting.recorded = False
    requested = _unrecorded(request)
    if requested is None or isinstance(error, _UNRECORDED):
        return error
    services: Services = request.app.state.services
    try:
        await services.records.record_event(requested.event("failed", code=error.code))
    except DermError as unrecorded:
        return unrecorded
    return error


def problem_response(
    request: Request, *, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Make one problem document; `code` is stable, `detail` is for people."""
    body = {
        "type": f"urn:derm-cds:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request.scope.get("request_id", ""),
    }
    return JSONResponse(body, status_code=status, media_type=CONTENT_TYPE, headers=dict(headers or {}))


def _allowed(request: Request) -> str:
    """The methods that the path of a request has a route for; HEAD where it has GET (app.py)."""
    found = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))


def _name(location: Sequence[str | int]) -> str:
    """The field that a fault is in; of a repeated one, a location ends with which of its values it is."""
    return next((part for part in reversed(location) if isinstance(part, str)), "request")


async def _on_derm_error(request: Request, error: DermError) -> JSONResponse:
    error = await record_failure(request, error)
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s in request %s", type(error).__name__, request.scope.get("request_id"))
    return problem_response(request, status=error.status, code=error.code, detail=str(error), headers=headers)


async def _on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        # The router names only the methods of the path's first route.
        headers["Allow"] = _allowed(request)
    code = _FRAMEWORK_CODES.get(error.status_code, "bad_request")
    return problem_response(
        request, status=error.status_code, code=code, detail=str(error.detail), headers=headers
    )


async def _on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    if requested := _unrecorded(request):
        services: Services = request.app.state.services
        try:
            await services.authenticator.record_invalid(requested)
        except DermError as unrecorded:
            return await _on_derm_error(request, unrecorded)
    # Locations and rules only: the offending value may be patient data.
    faults = "; ".join(f"{_name(fault['loc'])}: {fault['msg']}" for fault in error.errors())
    return problem_response(request, status=422, code="invalid_field", detail=faults)


async def _on_defect(request: Request, error: Exception) -> JSONResponse:
    logger.error("Unhandled %s in request %s", type(error).__name__, request.scope.get("request_id"))
    if requested := _unrecorded(request):
        services: Services = request.app.state.services
        with contextlib.suppress(DermError):  # the log may be what has failed
            await services.records.record_event(requested.event("failed", code="internal"))
    return problem_response(
        request,
        status=500,
        code="internal",
        detail="The service failed; the request id names the event.",
        # Starlette answers a defect outside of every middleware.
        headers=request.scope.get("request_id_headers"),
    )


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every error of an app in the one problem shape."""
    app.exception_handler(DermError)(_on_derm_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(Exception)(_on_defect)

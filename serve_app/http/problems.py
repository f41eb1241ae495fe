"""What fails is in the audit log: once, in whichever route, unless the route has recorded it itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
from http import HTTPStatus
import logging
from typing import Any
from uuid import UUID

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve_app.access.rules import RequestedAction
from serve_app.domain.errors import Conflict, DermError, Overloaded, RecordsUnavailable
from serve_app.http.services import Services

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
        await services.authenticator.record_fault(attempt, "invalid_field")


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


logger = logging.getLogger("derm.api")

CONTENT_TYPE = "application/problem+json"

#: Codes for what the framework itself answers.
_FRAMEWORK_CODES = {404: "not_found", 405: "method_not_allowed"}


def problem_response(
    request: Request,
    *,
    status: int,
    code: str,
    detail: str,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Make one problem document; `code` is stable, `detail` is for people."""
    body: dict[str, Any] = {
        "type": f"urn:derm-cds:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "request_id": request.scope.get("request_id", ""),
    }
    return JSONResponse(body, status_code=status, media_type=CONTENT_TYPE, headers=dict(headers or {}))


def _allowed(request: Request) -> list[str]:
    """The methods that the path of a request has a route for; HEAD where it has GET (app.py)."""

    def has(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    found = {method for method in ("DELETE", "GET", "PATCH", "POST", "PUT") if has(method)}
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def _name(location: Sequence[str | int]) -> str:
    """The field that a fault is in; of a repeated one, a location ends with which of its values it is."""
    return next((part for part in reversed(location) if isinstance(part, str)), "request")


def install_problem_handlers(app: FastAPI) -> None:
    """Answer every error of an app in the one problem shape."""

    async def on_derm_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, DermError)  # noqa: S101 - narrows for the type checker
        error = await record_failure(request, error)
        headers = {}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        if error.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
            logger.error("%s in request %s", type(error).__name__, request.scope.get("request_id"))
        return problem_response(
            request, status=error.status, code=error.code, detail=str(error), headers=headers
        )

    async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - narrows for the type checker
        code = _FRAMEWORK_CODES.get(error.status_code, "bad_request")
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # The router names only the methods of the path's first route.
            headers["Allow"] = ", ".join(_allowed(request))
        return problem_response(
            request,
            status=error.status_code,
            code=code,
            detail=str(error.detail),
            headers=headers,
        )

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101 - narrows for the type checker
        # Locations and rules only: the offending value may be patient data.
        try:
            await record_fault(request)
        except DermError as unrecorded:
            return await on_derm_error(request, unrecorded)
        faults = "; ".join(f"{_name(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        return problem_response(request, status=422, code="invalid_field", detail=faults)

    async def on_defect(request: Request, error: Exception) -> JSONResponse:
        logger.error("Unhandled %s in request %s", type(error).__name__, request.scope.get("request_id"))
        await record_defect(request)
        return problem_response(
            request,
            status=500,
            code="internal",
            detail="The service failed; the request id names the event.",
            # Starlette answers a defect outside of every middleware.
            headers=request.scope.get("request_id_headers"),
        )

    app.add_exception_handler(DermError, on_derm_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_defect)

"""Every error in the one problem shape, and on record once, in whichever route; X-Request-ID on every response.

The id that is answered is the caller's, if it sent a sane one, else ours. What is kept (logs, audit log, problem
documents) is the caller's only where its form names nobody: an id of free text may hold a name, a date of birth or
a patient's number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
from http import HTTPStatus
import logging
from urllib.parse import parse_qsl
from uuid import UUID

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.access.rules import RequestedAction
from serve_app.domain.errors import Conflict, DermError, Overloaded, RecordsUnavailable, describe_problem
from serve_app.domain.identifiers import is_opaque, is_plain, new_id
from serve_app.fhir.codes import MEDIA_TYPE, operation_outcome
from serve_app.http.services import Services
from serve_app.logs import begin_request, end_request

logger = logging.getLogger("derm.api")

_CONTENT_TYPE = "application/problem+json"

#: Refused before anything was looked at, or there is no log to write to; the caller tries again.
_UNRECORDED = (Overloaded, RecordsUnavailable)

#: What the headers of a request may be; HAProxy lets more through (cluster/haproxy.sed), so that the answer is ours.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024

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


async def _record_failure(request: Request, error: DermError) -> DermError:
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
    """Answer with one problem document; a caller who takes nothing but FHIR gets its words as an OperationOutcome."""
    body = describe_problem(status, code, detail, request.scope.get("request_id", ""))
    ranges = [each.partition(";")[0].strip().lower() for each in request.headers.get("accept", "").split(",")]
    only_fhir = all(each == MEDIA_TYPE for each in ranges)
    content, media_type = (operation_outcome(body), MEDIA_TYPE) if only_fhir else (body, _CONTENT_TYPE)
    return JSONResponse(content, status_code=status, media_type=media_type, headers=dict(headers or {}))


def _allowed(request: Request) -> str:
    """The methods that the path of a request has a route for; HEAD where it has GET (app.py)."""
    found = {
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        for route in request.app.routes
        if route.matches({**request.scope, "method": method})[0] is Match.FULL
    }
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))


async def _on_derm_error(request: Request, error: DermError) -> JSONResponse:
    error = await _record_failure(request, error)
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
    # Locations and rules only: the offending value may be patient data. A location may end with a number.
    faults = [
        f"{next((part for part in reversed(fault['loc']) if isinstance(part, str)), 'request')}: {fault['msg']}"
        for fault in error.errors()
    ]
    return problem_response(request, status=422, code="invalid_field", detail="; ".join(faults))


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


class RequestIdMiddleware:
    """Put the id to keep into the scope and, unless the server in front does (`answer`), the id onto the response.

    `scope["request_id_headers"]` is for responses that are made outside of this middleware.
    """

    def __init__(self, app: ASGIApp, *, answer: bool = True) -> None:
        self._app = app
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        request_id = sent if is_opaque(sent) else str(new_id())
        added = {"X-Request-ID": sent if is_plain(sent) else request_id} if self._answer else {}
        scope["request_id"], scope["request_id_headers"] = request_id, added

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        begin_request(request_id, _of_the_caller(scope))
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        answer = self._app
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            detail = f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together."
            answer = problem_response(Request(scope), status=431, code="headers_too_large", detail=detail)
        await answer(scope, receive, send_with_id)
        # Not after a defect: that is logged outside of here, by what surrounds every middleware.
        end_request()


def _of_the_caller(scope: Scope) -> Iterator[str]:
    """What no log line of this request may hold: credentials, the caller's own ids, and query string."""
    headers = Headers(scope=scope)
    if not is_opaque(sent := headers.get("x-request-id", "")):
        yield sent
    yield headers.get("authorization", "").partition(" ")[2].strip()
    yield headers.get("idempotency-key", "")
    query = scope.get("query_string", b"").decode("latin-1")
    yield query
    yield from (value for _, value in parse_qsl(query))

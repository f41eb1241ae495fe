"""X-Request-ID: the caller's, if it sent a sane one, else ours; on every response.

What is kept (logs, audit log, problem documents) is the caller's only where its form names nobody: an id of
free text may hold a name, a date of birth or a patient's number.
"""

from __future__ import annotations

from collections.abc import Iterator
import re
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.domain.identifiers import is_opaque, new_id
from serve_app.http.problems import problem_response
from serve_app.logs import begin_request, end_request

# Short and plain: it is written back into a header.
_SANE = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: What the headers of a request may be; HAProxy lets more through (cluster/haproxy.sed), so that the answer is ours.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 16 * 1024


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
        added = {"X-Request-ID": sent if _SANE.fullmatch(sent) else request_id} if self._answer else {}
        scope["request_id"], scope["request_id_headers"] = request_id, added

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(added)
            await send(message)

        begin_request(request_id, _of_the_caller(scope))
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        answer = self._app
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            answer = _too_large(Request(scope))
        await answer(scope, receive, send_with_id)
        # Not after a defect: that is logged outside of here, by what surrounds every middleware.
        end_request()


def _too_large(request: Request) -> Response:
    return problem_response(
        request,
        status=431,
        code="headers_too_large",
        detail=f"A request may have {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together.",
    )


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

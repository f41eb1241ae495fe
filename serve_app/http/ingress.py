"""What stands around Ray Serve's own HTTP code, at every port where a request can come in.

Serve 2.60 obeys headers that any caller can send. To see a caller hang up it reads a body ahead of the application,
without bound, and then cancels the request, audit event and all. What it says itself is plain text. Here its headers
are taken away, and it is told not to watch for those who hang up: the application then reads a body itself, at its own
pace, and a request that was begun runs to its end. Every answer that is not the application's is a problem document.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.domain.errors import DermError, Interrupted, NotFound, Overloaded, describe_problem
from serve_app.domain.identifiers import is_opaque, is_plain, new_id

#: Who connected to HAProxy, in HAProxy's own words (cluster/haproxy.sed): to us, all callers are HAProxy.
PEER = b"x-derm-peer"
_HEALTH = b"/-/healthz"
_LOOPBACK = frozenset({"127.0.0.1", "::1"})

#: How a header begins that Serve would obey; it takes `_` for `-`.
CONTROLS = (
    *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"x-session-id"),
    *(b"serve-multiplexed-model-id", b"x-serve-router-", b"traceparent", b"tracestate"),
)
_KEEP_GOING = (b"x-request-disconnect-disabled", b"?1")

#: How much is read, and dropped, of a body that was answered before its end, so that its sender comes to read the
#: answer: bytes (the largest upload is 20 MiB by default) and seconds. Past either the connection is closed.
LINGER_BYTES = 32 * 1024 * 1024
LINGER_S = 5.0


class IngressMiddleware:
    """Passes a request on to Serve without what is not its caller's to say, and the answer back.

    `room` is for Serve's own proxy, which reads ahead all the same: bytes that the bodies it holds at once may have
    together. A body that is larger than what is left of them, or does not say how large it is, is refused.
    """

    def __init__(self, app: ASGIApp, *, room: int | None = None) -> None:
        self._app = app
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":  # a WebSocket: there is no route for one
            await send({"type": "websocket.close"})
            return
        exchange = Exchange(scope, receive, send)
        # Serve's own pages, however spelt: none but what HAProxy asks whether this is up.
        if scope["path"].startswith("/-/") and scope["raw_path"] != _HEALTH:
            await exchange.answer(NotFound())
        elif self._room is None:
            await exchange.run(self._app)
        elif exchange.size is None or exchange.size > self._room:
            await exchange.answer(Overloaded())
        else:
            self._room -= exchange.size
            try:
                await exchange.run(self._app)
            finally:
                self._room += exchange.size
        await exchange.finish()


#: What Serve means by its own answers; by any other that somebody or something has ended the request.
_ERRORS: dict[int, type[DermError]] = {404: NotFound, 429: Overloaded, 503: Overloaded}


class Exchange:
    """One request and its answer, as they pass."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        kept: list[tuple[bytes, bytes]] = []
        ids: list[str] = []
        #: Bytes of the body; None: not known.
        self.size: int | None = 0
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                ids.append(value.decode("latin-1"))
            elif name == PEER:
                if scope["client"] and scope["client"][0] in _LOOPBACK:
                    scope["client"] = (value.decode("latin-1"), 0)
            elif not name.replace(b"_", b"-").startswith(CONTROLS):
                kept.append((name, value))
                if name == b"transfer-encoding":
                    self.size = None
                elif name == b"content-length" and self.size is not None:
                    self.size = int(value)
        self._unread = self.size != 0
        self._begun = self._ended = self._replaced = False
        self._request_id = ids[0] if len(ids) == 1 and is_plain(ids[0]) else str(new_id())
        scope["headers"] = [*kept, (b"x-request-id", self._request_id.encode()), _KEEP_GOING]

    async def run(self, app: ASGIApp) -> None:
        """Have the request answered, and be it by us."""
        try:
            await app(self._scope, self.receive, self.send)
        except Exception:  # Serve has it in its log
            if self._begun and not self._ended:
                raise  # in the middle: there is nothing to do but to close the connection
        if not self._begun:
            await self.answer(Interrupted())

    async def receive(self) -> Message:
        """Pass on one piece of the body."""
        message = await self._receive()
        self._unread = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on one piece of the answer; what is not a problem document but should be becomes one."""
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self._begun, status = True, message["status"]
            kind = Headers(raw=message["headers"]).get("content-type", "")
            if status >= 400 and kind.startswith("text/plain"):  # no error of the application's
                await self.answer(_ERRORS.get(status, Interrupted)())
                self._replaced = True
                return
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._ended = True
            if self._unread:
                # To the caller this is all of it; the server would drop what is left of the body, whatever it takes.
                message = {**message, "more_body": True}
        await self._send(message)

    async def answer(self, error: DermError) -> None:
        """Answer in the application's place."""
        request_id = self._request_id if is_opaque(self._request_id) else str(new_id())
        body = describe_problem(error.status, error.code, str(error), request_id)
        headers = {"X-Request-ID": self._request_id}
        if error.retry_after_s is not None:
            headers["Retry-After"] = str(error.retry_after_s)
        response = JSONResponse(body, error.status, headers, media_type="application/problem+json")
        await response(self._scope, self.receive, self.send)

    async def finish(self) -> None:
        """Once answered, read what is left of the body; more of it than LINGER_BYTES or LINGER_S ends the connection."""
        if not (self._ended and self._unread):
            return
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while dropped < LINGER_BYTES:
                    message = await self.receive()
                    if not message.get("more_body", False):
                        await self._send({"type": "http.response.body"})
                        return
                    dropped += len(message["body"])

"""What stands around Serve's own HTTP code: what it takes from a request, and makes of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
import re
import socket
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp
import uvicorn

from serve_app.domain.identifiers import is_opaque
from serve_app.http import ingress
from serve_app.http.ingress import IngressMiddleware

Answer = Callable[[Request], Awaitable[Response]]


def serve(answer: Answer) -> ASGIApp:
    """Ray Serve, as far as it matters here: an application that sees every header."""

    async def app(scope, receive, send) -> None:
        request = Request(scope, receive)
        await (await answer(request))(scope, receive, send)

    return app


async def echo(request: Request) -> Response:
    return JSONResponse({"headers": request.headers.items(), "client": request.client.host})


def caller(app: ASGIApp, peer: str = "127.0.0.1") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(peer, 1)), base_url="http://derm")


def obeyed() -> set[str]:
    """The headers that this Ray obeys, by its sources."""
    folder = Path(find_spec("ray").origin).parent / "serve" / "_private"
    constants = (folder / "constants.py").read_text()
    named = re.findall(
        r'^SERVE_\w*(?:HEADER|HEADER_PREFIX|MODEL_ID|SESSION_ID)\b = .*"([\w-]+)"', constants, re.MULTILINE
    )
    traced = set(re.findall(r'"(trace\w+)"', (folder / "replica.py").read_text()))
    return {*named, *traced} - {"traces"}


async def test_what_serve_obeys_is_not_the_callers_to_say() -> None:
    headers = obeyed()
    assert {
        *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id", "x-request-id"),
        *("serve_multiplexed_model_id", "x-serve-router-", "traceparent", "tracestate"),
    } == headers
    headers.remove("x-request-id")
    spelt = [name.replace("_", mark).replace("-", mark) for name in headers for mark in "_-"]
    async with caller(IngressMiddleware(serve(echo))) as client:
        sent = dict.fromkeys(spelt, "caller") | {"X-Kept": "caller"}
        received = dict((await client.get("/", headers=sent)).json()["headers"])
    assert [name for name, value in received.items() if value == "caller"] == ["x-kept"]
    assert received["x-request-disconnect-disabled"] == "?1"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        (["pms-7.a_b"], True),
        (["x" * 64], True),
        (["x" * 65], False),
        (["Jane Doe, 1950"], False),
        (["a", "b"], False),
        ([], False),
    ],
    ids=["plain", "64", "65", "free text", "two", "none"],
)
async def test_only_a_short_and_plain_request_id_goes_on(sent: list[str], kept: bool) -> None:  # noqa: FBT001
    """Serve answers with whatever it gets."""
    async with caller(IngressMiddleware(serve(echo))) as client:
        answer = await client.get("/", headers=[("X-Request-ID", value) for value in sent])
    (received,) = [value for name, value in answer.json()["headers"] if name == "x-request-id"]
    assert (received in sent) is kept
    assert kept or is_opaque(received)


@pytest.mark.parametrize(
    ("peer", "seen"), [("127.0.0.1", "10.1.2.3"), ("::1", "10.1.2.3"), ("10.9.9.9", "10.9.9.9")]
)
async def test_only_haproxy_tells_who_called(peer: str, seen: str) -> None:
    async with caller(IngressMiddleware(serve(echo)), peer) as client:
        answer = (await client.get("/", headers={"X-Derm-Peer": "10.1.2.3"})).json()
    assert answer["client"] == seen
    assert "x-derm-peer" not in dict(answer["headers"])


async def raising(_: Request) -> Response:
    raise RuntimeError


async def silent(_: Request) -> Any:
    async def nothing(*_: object) -> None:
        pass

    return nothing


def plainly(status: int) -> Answer:
    async def answer(_: Request) -> Response:
        return PlainTextResponse("Request dropped", status)

    return answer


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (plainly(404), 404, "not_found"),
        (plainly(429), 503, "overloaded"),
        (plainly(503), 503, "overloaded"),
        (plainly(408), 502, "interrupted"),
        (plainly(499), 502, "interrupted"),
        (plainly(500), 502, "interrupted"),
        (raising, 502, "interrupted"),
        (silent, 502, "interrupted"),
    ],
)
async def test_what_serve_says_itself_becomes_a_problem_document(
    answer: Answer, status: int, code: str
) -> None:
    async with caller(IngressMiddleware(serve(answer))) as client:
        found = await client.get("/")
    assert (found.status_code, found.headers["content-type"]) == (status, "application/problem+json")
    body = found.json()
    assert (body["status"], body["code"], body["request_id"]) == (status, code, found.headers["x-request-id"])
    assert (int(found.headers.get("retry-after", "0")) > 0) is (status >= 500)


async def test_every_other_answer_is_left_as_it_is() -> None:
    for given in (PlainTextResponse("fine"), JSONResponse({"code": "conflict"}, 409)):

        async def answer(_: Request, given: Response = given) -> Response:
            return given

        async with caller(IngressMiddleware(serve(answer))) as client:
            found = await client.get("/")
        assert (found.status_code, found.content) == (given.status_code, given.body)


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[int]:
    """A real server in front of it, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def refusing(_: Request) -> Response:
    return JSONResponse({"code": "unauthenticated"}, 401)


async def test_serves_own_pages_are_not_told_however_they_are_spelt() -> None:
    """Serve compares the decoded path. What HAProxy asks a replica goes on, in that one spelling."""
    hidden = (
        "/-/routes",
        "/%2d/routes",
        "/-%2Froutes",
        "/%2D%2froutes",
        "/%2d/healthz",
        "/-/health%7a",
        "/-/x",
    )
    status = dict.fromkeys(hidden, 404) | dict.fromkeys(("/-/healthz", "/-", "/%252d/routes"), 401)
    async with listening(IngressMiddleware(serve(refusing))) as port:
        for path, expected in status.items():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path}?a=b HTTP/1.1\r\nHost: derm\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 %d " % expected), path
            assert (b"urn:derm-cds:problem:not_found" in answer) is (expected == 404)


async def test_who_is_refused_comes_to_read_it_and_may_ask_again() -> None:
    async with listening(IngressMiddleware(serve(refusing))) as port:
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", limits=limits) as client:
            answers = [await client.post("/", content=b"x" * 3_000_000) for _ in range(3)]
        streams = {id(answer.extensions["network_stream"]) for answer in answers}
    assert [answer.status_code for answer in answers] == [401] * 3
    assert len(streams) == 1


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("head", ["Content-Length: 1000000000", "Transfer-Encoding: chunked"])
async def test_who_goes_on_and_on_is_cut_off(monkeypatch, head: str, *, slow: bool) -> None:
    monkeypatch.setattr(ingress, "LINGER_BYTES", 1_000_000)
    monkeypatch.setattr(ingress, "LINGER_S", 0.5 if slow else 60)
    body = b"x" * (1 if slow else 65_536)
    piece = b"%x\r\n%s\r\n" % (len(body), body) if "chunked" in head else body
    async with listening(IngressMiddleware(serve(refusing))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"POST / HTTP/1.1\r\nHost: derm\r\n{head}\r\n\r\n".encode())
        assert b" 401 " in await reader.readline()
        sent = 0
        async with asyncio.timeout(30):
            with suppress(OSError):  # reset, or a broken pipe
                while True:
                    writer.write(piece)
                    await writer.drain()
                    sent += len(body)
                    await asyncio.sleep(0.05 if slow else 0)
        assert sent < 30_000_000  # what the sockets hold is on top
        writer.close()


async def test_serves_own_proxy_holds_no_more_than_it_has_room_for() -> None:
    go_on = asyncio.Event()

    async def hold(request: Request) -> Response:
        if request.method == "POST":
            await go_on.wait()
        return JSONResponse(len(await request.body()))

    async def pieces() -> AsyncIterator[bytes]:
        yield b"x"

    async with (
        listening(IngressMiddleware(serve(hold), room=100)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        first = asyncio.create_task(client.post("/", content=b"x" * 60))
        await asyncio.sleep(0.2)
        for body in (b"x" * 41, pieces()):
            refused = await client.post("/", content=body)
            assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert (await client.get("/")).status_code == 200
        go_on.set()
        assert (await first).json() == 60
        assert (await client.post("/", content=b"x" * 100)).json() == 100

"""What a caller can do at the ways in: bodies without an end, made-up addresses, Ray's own controls, hanging up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace
import json
import select
import socket
import ssl
import time
from uuid import uuid4

import httpx
import psutil
import pytest

from serve_app.domain.identifiers import new_id
from tests.cluster.tls_terminator import terminator

pytestmark = pytest.mark.ray

ENDLESS = 2_000_000_000
PIECE = b"x" * 65_536
#: What a replica may take on top of what it has, bytes, whatever is sent.
ROOM = 64 * 1024 * 1024
LOCAL = "127.0.0.1"
#: Nobody's proxy; 127.0.0.1 is one on this node (conftest.py).
STRANGER = "127.0.0.8"
BAD = {"Authorization": "Bearer nobody"}


@asynccontextmanager
async def no_event_written(pms) -> AsyncIterator[None]:
    """Have whoever is refused wait for the answer, since its event comes first; below the database's time limit."""
    async with pms.owner.connection() as connection, connection.transaction():
        await connection.execute("LOCK TABLE audit_events IN EXCLUSIVE MODE")
        yield


def ports(node) -> dict[str, int]:
    """The front, a replica's own port, and Serve's own proxy."""
    (replica,) = node.replicas("ingress")
    (own,) = {
        found.laddr.port
        for found in replica.net_connections(kind="tcp")
        if found.status == psutil.CONN_LISTEN and 30_000 <= found.laddr.port < 32_000
    }
    return {"front": node.port, "replica": own, "fallback": node.ray.fallback_port}


def stream(
    port: int, head: str, headers: dict[str, str], *, stop: list[bool], every_s: float = 0.0
) -> httpx.Response:
    """Send a body that does not end until an answer comes, the other side hangs up, or all is to stop."""
    chunked = "Transfer-Encoding" in headers
    piece = b"10000\r\n" + PIECE + b"\r\n" if chunked else PIECE
    if every_s:
        piece = b"1\r\nx\r\n" if chunked else b"x"
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "derm", **headers}.items())
    with socket.create_connection((LOCAL, port)) as there:
        there.sendall(f"{head} HTTP/1.1\r\n{lines}\r\n".encode())
        with suppress(OSError):
            while not stop:
                readable, writable, _ = select.select([there], [there], [], 0.1)
                if readable:
                    break
                if writable:
                    there.send(piece)  # in part, perhaps: nobody reads it
                time.sleep(every_s)
        return read_answer(there)


def read_answer(there: socket.socket) -> httpx.Response:
    """Read one answer; status 0 where there is none."""
    there.settimeout(5)
    received = b""
    with suppress(OSError):
        while more := there.recv(65_536):
            received += more
            head, _, body = received.partition(b"\r\n\r\n")
            length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            if length and len(body) >= int(length[0].split(b":")[1]):
                break
    if not received:
        return httpx.Response(0)
    head, _, body = received.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return httpx.Response(
        int(status.split()[1]), headers=[line.split(": ", 1) for line in lines], content=body
    )


def hold_to_problem(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, (response.status_code, response.text)
    assert response.headers["content-type"] == "application/problem+json"
    body = json.loads(response.content)
    assert set(body) == {"type", "title", "status", "code", "detail", "request_id"}
    assert (body["status"], body["code"], body["type"]) == (status, code, f"urn:derm-cds:problem:{code}")
    assert len(response.headers.get_list("x-request-id")) == 1
    if status in {429, 502, 503}:
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("way", ["front", "replica", "fallback"])
async def test_a_body_without_an_end_is_refused_and_takes_no_memory(pms, node, capsys, way: str) -> None:
    """2 GB, with a length and without, of strangers and of callers, where a body belongs and where none does."""
    port = ports(node)[way]
    watched = node.replicas("ingress") + [
        p for p in node.ray.processes() if "ProxyActor" in " ".join(p.cmdline())
    ]
    assert len(watched) == 2
    before = [process.memory_info().rss for process in watched]
    upload, replay = "POST /api/lesions", f"POST /api/lesions/{uuid4()}/assessments/{uuid4()}/replay"
    length = {"Content-Length": str(ENDLESS)}
    chunked = {"Transfer-Encoding": "chunked"}
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    sent = [
        (upload, pms.token() | kind | length, 413, "too_large", 0.0),
        *((upload, BAD | kind | framing, 401, "unauthenticated", 0.0) for framing in (length, chunked)),
        *((replay, pms.token() | framing, 422, "invalid_field", 0.0) for framing in (length, chunked)),
        (replay, pms.token() | chunked, 422, "invalid_field", 0.1),
    ]
    stop: list[bool] = []
    growth = 0

    async def watch() -> None:
        nonlocal growth
        while True:
            now = [process.memory_info().rss for process in watched]
            growth = max(growth, *(new - old for new, old in zip(now, before, strict=True)))
            if growth > ROOM:
                stop.append(True)
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    streams = []
    try:
        async with no_event_written(pms):
            streams = [
                asyncio.create_task(asyncio.to_thread(stream, port, head, headers, stop=stop, every_s=every))
                for head, headers, _, _, every in sent
            ]
            async with asyncio.timeout(3):
                await asyncio.sleep(1)
                assert (await pms.client.get("/healthz")).status_code == 200
        answers = await asyncio.wait_for(asyncio.gather(*streams), 30)
    finally:
        stop.append(True)
        watching.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    with capsys.disabled():
        print(f"\n{way}: at most {growth / 1e6:.1f} MB more")
    assert growth < ROOM
    for answer, (_, _, status, code, _) in zip(answers, sent, strict=True):
        hold_to_problem(answer, *((503, "overloaded") if way == "fallback" else (status, code)))


async def test_a_made_up_address_is_not_believed(pms) -> None:
    """40 bad tokens from 40 made-up addresses are one address's."""
    transport = httpx.AsyncHTTPTransport(local_address=STRANGER)
    async with httpx.AsyncClient(transport=transport, base_url=pms.client.base_url, timeout=60) as client:
        answers = [
            await client.get(
                "/api/lesions",
                headers={**BAD, "X-Forwarded-For": f"10.7.{n}.1", "X-Derm-Peer": f"10.8.{n}.1"},
            )
            for n in range(40)
        ]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses[:30]) == {401}
    assert statuses[-1] == 429
    hold_to_problem(answers[-1], 429, "rate_limited")
    query = "SELECT DISTINCT detail ->> 'client' FROM audit_events WHERE request_id = ANY($1)"
    ids = [answer.json()["request_id"] for answer in answers]
    assert [row[0] for row in await pms.owner.fetch(query, ids)] == [STRANGER]


async def test_a_trusted_proxy_tells_whose_request_it_is(pms, node, tmp_path) -> None:
    """The documented terminator, which the node trusts, in front of it: its caller's address, whatever that one says."""
    with terminator(tmp_path, api=node.port) as tls:
        transport = httpx.AsyncHTTPTransport(
            verify=ssl.create_default_context(cafile=str(tls.authority)), local_address="127.0.0.5"
        )
        async with httpx.AsyncClient(transport=transport, base_url=f"https://{LOCAL}:{tls.port}") as client:
            told = await client.get("/api/lesions", headers={**BAD, "X-Forwarded-For": "10.7.0.1"})
    hold_to_problem(told, 401, "unauthenticated")
    query = "SELECT detail ->> 'client' FROM audit_events WHERE request_id = $1"
    assert await pms.owner.fetchval(query, told.json()["request_id"]) == "127.0.0.5"


async def test_a_caller_does_not_set_serves_time_limit(pms, node) -> None:
    headers = {**pms.token(), "X-Request-Timeout-Seconds": "0.1"}
    async with httpx.AsyncClient(timeout=60) as client:
        async with no_event_written(pms):
            asked = [
                asyncio.create_task(
                    client.get(f"http://{LOCAL}:{port}/api/lesions/{uuid4()}", headers=headers), name=way
                )
                for way, port in ports(node).items()
            ]
            await asyncio.sleep(0.5)
            assert [task.get_name() for task in asked if task.done()] == []
        for task in asked:
            hold_to_problem(await task, 403, "forbidden")


async def test_a_denial_is_on_record_though_the_caller_hung_up(pms, node) -> None:
    """By every way in, and whatever Ray is told to do about it."""
    sent = {}
    async with no_event_written(pms):
        with ExitStack() as connections:
            for way, port in ports(node).items():
                for extra in ({}, {"X-Request-Disconnect-Disabled": "?0"}):
                    sent[request_id := str(new_id())] = (way, extra)
                    headers = {"Host": "derm", "X-Request-ID": request_id, **pms.token(), **extra}
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                    there = connections.enter_context(socket.create_connection((LOCAL, port)))
                    there.sendall(f"GET /api/lesions/{uuid4()} HTTP/1.1\r\n{lines}\r\n".encode())
            await asyncio.sleep(0.5)  # they are being denied
        await asyncio.sleep(0.5)  # and nobody is there any more
    query = "SELECT request_id FROM audit_events WHERE outcome = 'denied' AND request_id = ANY($1)"
    missing, deadline = sent, time.monotonic() + 10
    while missing and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        found = {row[0] for row in await pms.owner.fetch(query, list(sent))}
        missing = {request_id: how for request_id, how in sent.items() if request_id not in found}
    assert not missing


async def test_what_is_not_our_applications_answer_is_a_problem_document_too(pms, node) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    hold_to_problem(await pms.client.request("FOO", "/healthz"), 400, "bad_request")
    for path in ("/-/routes", "/%2d/routes", "/-%2froutes"):
        hold_to_problem(await pms.client.get(path), 404, "not_found")
    hold_to_problem(await pms.client.get("/nothing", headers=upgrade), 404, "not_found")
    for way in ("replica", "fallback"):
        there = replace(pms, client=httpx.AsyncClient(base_url=f"http://{LOCAL}:{ports(node)[way]}"))
        async with there.client as client:
            hold_to_problem(await client.get("/nothing"), 404, "not_found")
            hold_to_problem(await client.get("/%2d/routes"), 404, "not_found")

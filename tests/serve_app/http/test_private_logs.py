"""Whatever happens to a request, no log record holds its patient, its file name, its token or its image.

The service runs as it does in a replica: in uvicorn, with the process's log in place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
import io
import json
import logging
from typing import Any

import asyncpg
import httpx
import pytest
import uvicorn

from serve_app.domain import errors
from serve_app.logs import ProcessLog, node_key
from tests.serve_app.conftest import SECRET, until
from tests.serve_app.erasure.erasing import path as path_of
from tests.serve_app.lesions.conftest import AlteredStages, failing

PATIENT = "Zyxwvutmuster"  # letters only: nothing in its form gives it away
ENCOUNTER = "Encounterzyx"
FILE = "Hans_Zyxmuster_naevus.png"
MARKS = (PATIENT, ENCOUNTER, "Zyxmuster", "zyxwvut")

_OURS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.DermError)]
_THEIRS = [ValueError, KeyError, OSError, MemoryError, asyncpg.UniqueViolationError, asyncpg.InterfaceError]


Said = tuple[pytest.LogCaptureFixture, io.StringIO]


@pytest.fixture
def log(logging_put_back, caplog) -> Said:
    """Every record, as any handler of any library would have got it, and what the process's log writes."""
    stream = io.StringIO()
    ProcessLog(node_key(SECRET), stream=stream).install()
    logging.getLogger().setLevel(logging.DEBUG)
    return caplog, stream


@asynccontextmanager
async def in_uvicorn(service: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the application over a socket, as Ray Serve's replica does."""
    config = uvicorn.Config(
        service.app, port=0, log_config=None, log_level="debug", access_log=True, lifespan="off"
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    running = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        await running


async def _send(client: httpx.AsyncClient, service: Any, headers: dict[str, str], **fields: str) -> int:
    data = {"patient_id": PATIENT, "encounter_id": ENCOUNTER, **fields}
    sent = {"params": {"top_k": "3"}, "data": data, "files": {"image": (FILE, service.image)}}
    return (await client.post("/api/lesions", headers=headers, **sent)).status_code


def _hold(log: Said, *more: str, without: str = "no logger") -> None:
    """No record and no line, but those of one logger, has anything of a request."""
    plain = logging.Formatter("%(name)s %(message)s")
    records = [f"{plain.format(each)} {vars(each)!r}" for each in log[0].records if each.name != without]
    lines = [line for line in log[1].getvalue().splitlines() if f'"{without}"' not in line]
    assert records
    for text in map(str.lower, (*records, *lines)):
        for mark in (*MARKS, *more, "JFIF", "\\x89PNG"):
            assert mark.lower() not in text, mark
    for line in lines:
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()


@pytest.mark.parametrize("stage", ["prepare", "classify"], ids=["before the first commit", "after it"])
async def test_no_error_brings_its_request_into_a_log(start_service, local_stages, log, stage) -> None:
    kinds = [*_OURS, *_THEIRS]
    assert len(kinds) > 30
    raised = iter(kinds)

    async def fail(answer: Any) -> None:
        answer.close()
        raise next(raised)(f"of {PATIENT} in {FILE} at {ENCOUNTER}: b'\\x89PNG'")

    stages = AlteredStages(local_stages(), stage, fail)
    async with start_service(stages, raise_app_exceptions=False) as service:
        await service.care("dr", PATIENT)
        headers = service.token("dr")
        async with in_uvicorn(service) as client:
            for kind in kinds:
                said = len(log[1].getvalue())
                status = await _send(client, service, headers)
                assert status in {201, 202, *range(400, 600)}, kind
                lines = [json.loads(line) for line in log[1].getvalue()[said:].splitlines()]
                if status == 500:
                    assert any(line.get("request_id") and line["level"] == "ERROR" for line in lines), kind
    assert next(raised, None) is None
    _hold(log, headers["Authorization"].split()[1])


async def test_a_request_id_that_names_somebody_is_not_kept(start_service, local_stages, log) -> None:
    """It comes back; logs, audit log and the problem document have an id of ours, which joins the three."""
    sent = (f"{PATIENT}.1950-01-31", PATIENT, "MRN-4711-0815")
    stages = AlteredStages(local_stages(), "prepare", failing(RuntimeError("broken")))
    async with start_service(stages, raise_app_exceptions=False) as service:
        await service.care("dr", PATIENT)
        ours = {}
        async with in_uvicorn(service) as client:
            for request_id in sent:
                headers = {**service.token("dr"), "X-Request-ID": request_id}
                upload = {"data": {"patient_id": PATIENT}, "files": {"image": (FILE, service.image)}}
                response = await client.post("/api/lesions", headers=headers, **upload)
                assert response.status_code == 500
                assert response.headers.get_list("x-request-id") == [request_id]
                ours[request_id] = response.json()["request_id"]
        events = await service.owner.fetch("SELECT request_id, detail::text FROM audit_events")
    _hold(log, *sent)
    said = [json.loads(line) for line in log[1].getvalue().splitlines()]
    assert {*ours.values()} <= {line.get("request_id") for line in said if line["level"] == "ERROR"}
    assert {*ours.values()} <= {event["request_id"] for event in events}
    assert not any(known in event["request_id"] + event["detail"] for event in events for known in sent)


async def test_a_request_id_that_names_nobody_is_the_same_everywhere(service) -> None:
    """A UUID, a trace id, a ULID."""
    for sent in (
        "01939d2c-7c1e-7000-8000-0123456789ab",
        "4BF92F3577B34DA6A3CE929D0E0E4736",
        "01ARZ3NDEKTSV4RRFFQ69G5FAV",
    ):
        response = await service.client.get("/api/lesions", headers={"X-Request-ID": sent})
        assert response.status_code == 401
        assert response.headers["x-request-id"] == response.json()["request_id"] == sent
        assert [event["request_id"] for event in await service.events(response)] == [sent]


async def test_no_refused_request_is_in_a_log(service, log) -> None:
    """Bad tokens, strangers, unknown fields and values, broken bodies, unknown paths, HTTP that is none; nor a search."""
    headers = service.token("dr")
    token = headers["Authorization"].split()[1]
    async with in_uvicorn(service) as client:
        assert await _send(client, service, {"Authorization": f"Bearer {token}x"}) == 401
        assert await _send(client, service, service.token("stranger")) == 403
        await service.care("dr", PATIENT)
        for field in (
            {FILE: "1"},
            {"sex": PATIENT},
            {"history": f'{{"{PATIENT}": true}}'},
            {"age_approx": FILE},
        ):
            assert await _send(client, service, headers, **field) == 422
        assert await _send(client, service, {**headers, "Idempotency-Key": f"{PATIENT} {FILE}"}) == 422
        bad = {**headers, "Content-Type": "multipart/form-data; boundary=b"}
        broken = f'--b\r\nContent-Disposition: form-data; name="{PATIENT}"\r\n\r\n{FILE}'.encode()
        assert (await client.post("/api/lesions", content=broken, headers=bad)).status_code == 422
        for path in (f"/api/{PATIENT}", f"/api/lesions/{PATIENT}", f"/{FILE}?patient_id={PATIENT}"):
            assert (await client.get(path, headers=headers)).status_code in {404, 422}
        query = {"patient_id": PATIENT, "limit": "x", "cursor": FILE}
        assert (await client.get("/api/lesions", params=query, headers=headers)).status_code == 422
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(f"GARBAGE {PATIENT}\r\nAuthorization {token}\r\n\r\n".encode())
        await writer.drain()
        await reader.read()
        writer.close()
        # Which diagnosis and site are thought of says something of the patient
        url = f"{path_of((await service.upload(PATIENT)).json())}/similar"
        for diagnosis, status in (("MEL", 200), (PATIENT, 422)):
            params = {"diagnosis": diagnosis, "anatom_site_general": "oral/genital"}
            assert (await client.get(url, params=params, headers=headers)).status_code == status
    # A node never turns uvicorn's access log on: it has paths in it.
    _hold(log, token, "diagnosis=", "oral/genital", "oral%2Fgenital", without="uvicorn.access")

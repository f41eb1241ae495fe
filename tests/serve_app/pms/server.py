"""A small PMS that really listens, keeps what it is told, and fails in every way asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
import json
import socket
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
import uvicorn

TOKEN = "the PMS's token"
IDS = ("assessment_id", "patient_id", "encounter_id", "review_id", "outcome_id", "report_id", "id")
#: What may be posted, to an encounter or to none, and which field acknowledges it.
ACKNOWLEDGED_BY = {"assessments": "assessment_id", "reviews": "review_id", "outcomes": "outcome_id"}


class PmsServer:
    """`fault` is asked before each request: None, or "slow", "403", "500", "404", "page" (200 without JSON), "wrong"
    (200 with another's JSON), "drop" (no answer), and for a message "lost" (kept, but the answer is lost)."""

    def __init__(self) -> None:
        self.patients: dict[str, dict[str, Any]] = {}
        self.encounters: dict[str, str] = {}
        self.fault: Callable[[Request], str | None] = lambda _: None
        self.slow_s = 1.0
        #: Assessments by encounter, in the order they were kept: (idempotency key, body).
        self.kept: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        #: Everything else, by path: likewise.
        self.others: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        #: Paths in the order in which something was kept there, with its media type.
        self.order: list[tuple[str, str]] = []
        #: Every message that came in whole, kept or known already.
        self.seen: list[str] = []
        self.asked: list[str] = []
        self.app = self._make_app()
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def register(self, patient_id: str, *encounters: str, **known: Any) -> None:
        self.patients[patient_id] = {"patient_id": patient_id, **known}
        self.encounters |= dict.fromkeys(encounters, patient_id)

    def start(self) -> None:
        """Listen, on the same port as before."""
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.01)

    def stop(self) -> None:
        """Be down: connections are refused."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(10)
        self._server = self._thread = None

    def _make_app(self) -> FastAPI:
        app = FastAPI()
        app.get("/api/patients/{patient_id}")(self._patient)
        app.get("/api/encounters/{encounter_id}")(self._encounter)
        app.post("/api/encounters/{encounter_id}/{name}")(self._message)
        app.post("/api/reports")(self._message)
        return app

    async def _patient(self, request: Request, patient_id: str) -> Response:
        return await self._look_up(request, {"patient_id": patient_id}, self.patients.get(patient_id))

    async def _encounter(self, request: Request, encounter_id: str) -> Response:
        owner = self.encounters.get(encounter_id)
        found = {"patient_id": owner} if owner else None
        return await self._look_up(request, {"encounter_id": encounter_id}, found)

    async def _look_up(
        self, request: Request, asked: dict[str, str], found: dict[str, Any] | None
    ) -> Response:
        self.asked.append(request.url.path)
        if (fault := self.fault(request)) is not None:
            return await self._answer_with(fault)
        return JSONResponse(asked | (found or {}), 200 if found else 404)

    async def _message(self, request: Request) -> Response:
        encounter_id, name = (request.path_params.get(part) for part in ("encounter_id", "name"))
        body = json.loads(await request.body())
        fault = self.fault(request)
        if fault not in {None, "lost"}:
            return await self._answer_with(str(fault))
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({}, 401)
        key = request.headers["idempotency-key"]
        self.seen.append(key)
        path = request.url.path
        kept = (
            self.kept.setdefault(encounter_id, [])
            if name == "assessments"
            else self.others.setdefault(path, [])
        )
        if key not in [known for known, _ in kept]:
            kept.append((key, body))
            self.order.append((path, request.headers["content-type"]))
        if fault == "lost":
            return Lost()
        if body.get("resourceType") == "Bundle":
            return JSONResponse({"id": body["id"]}, 201)
        field = ACKNOWLEDGED_BY.get(name, "report_id")
        return JSONResponse({field: body[field]}, 201)

    async def _answer_with(self, fault: str) -> Response:
        if fault == "slow":
            await asyncio.sleep(self.slow_s)
        answers: dict[str, Callable[[], Response]] = {
            "slow": lambda: JSONResponse({}, 200),
            "403": lambda: JSONResponse({"detail": "not yours"}, 403),
            "500": lambda: JSONResponse({"detail": "internal"}, 500),
            "404": lambda: JSONResponse({"message": "no Route matched"}, 404),
            "page": lambda: PlainTextResponse("<html>Please log in</html>", 200),
            "wrong": lambda: JSONResponse(dict.fromkeys(IDS, "another"), 200),
            "drop": Lost,
            "lost": Lost,
        }
        return answers[fault]()


class Lost(Response):
    """Breaks the connection off instead of answering."""

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        # Fewer bytes than announced: the server closes, and the client's answer is incomplete.
        headers = [(b"content-length", b"1000"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{"})


@contextmanager
def running_pms() -> Iterator[PmsServer]:
    server = PmsServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()

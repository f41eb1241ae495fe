"""A key service on loopback for tests and faults, which can be down, slow or in trouble when told so."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import socket
from threading import Thread
import time
from typing import Any, Protocol

Answer = tuple[int, dict[str, Any] | None]


class Service(Protocol):
    """What is served: the answers of one kind of key service."""

    content_type: str

    def answer(self, path: str, headers: Mapping[str, str], body: dict[str, Any]) -> Answer:
        """Answer a request: status and document."""
        ...

    def fault(self, status: int) -> dict[str, Any]:
        """Make the document of an answer that tells of trouble."""
        ...


class KeyService:
    """Serves a Service over HTTP; `faults` is what the next requests get instead: a status, or seconds to wait.

    `always` is the status that all get while it is set. While `down`, connections are refused. `requests` counts those that arrived.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.faults: list[int | float] = []
        self.always: int | None = None
        self.requests = 0
        self._connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        """Listen, on the port that it had before."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests += 1
                status, document = outer._reply(self.path, dict(self.headers.items()), body)
                content = b"" if document is None else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", outer.service.content_type)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

            def handle(self) -> None:
                outer._connections.add(self.connection)
                try:
                    super().handle()
                except OSError:  # a client that would wait no longer, or `down`
                    self.close_connection = True
                finally:
                    outer._connections.discard(self.connection)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def down(self) -> None:
        """Stop listening, and break the connections that there are."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in tuple(self._connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        fault = self.faults.pop(0) if self.faults else self.always
        if isinstance(fault, float):
            time.sleep(fault)
        elif fault is not None:
            return fault, self.service.fault(fault)
        return self.service.answer(path, headers, json.loads(body or b"{}"))

"""A stand-in for the ISIC Archive and its bucket: a real HTTP server that speaks their protocols, faults included.

Paging, cursors and errors follow ImageMarkup/isic (`isic/core/api/image.py`, `isic/core/pagination.py`), the
snapshot follows `isic/core/services/snapshot`.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable
import csv
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
import io
import json
import re
import socket
import struct
import threading
import time
from urllib.parse import parse_qs, quote, urlencode, urlsplit
import zipfile

import pytest

from data_jobs.references.fetch.http import Http, Pace
from data_jobs.references.fetch.sources import Archive, Bucket, flatten
from tests.http_server import serving

Fault = int | str | tuple[int, str]


@dataclass
class ArchiveServer:
    """`images`: what there is, newest first. `faults`: for the next requests whose path has the key in it.

    A fault is a status, a status with its Retry-After, or what happens to the body that would have been sent: "reset",
    "cut" (half of what was announced), "short" (half, announced as such), "garbage", "whole" (no ranges) or "hang".
    A URL is where a redirection leads.
    """

    new_jpeg: Callable[[int], bytes]
    images: dict[str, dict] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    page: int = 100
    delay_s: float = 0.0
    base: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def api(self) -> str:
        return f"{self.base}/api/v2/"

    @property
    def bucket(self) -> str:
        return f"{self.base}/bucket/"

    def add(self, *images: dict, data: bytes | None = None) -> None:
        for image in images:
            isic_id = image["isic_id"]
            self.images[isic_id] = image
            self.files[isic_id] = self.new_jpeg(int(isic_id[5:])) if data is None else data

    def fail(self, path: str, *faults: Fault) -> None:
        self.faults.setdefault(path, deque()).extend(faults)

    def paths(self, part: str = "") -> list[str]:
        return [path for path in self.seen if part in path]

    def fault(self, path: str) -> Fault | None:
        with self.lock:
            for part, waiting in self.faults.items():
                if part in path and waiting:
                    return waiting.popleft()
        return next((fault for part, fault in self.always.items() if part in path), None)

    def image(self, isic_id: str) -> dict:
        # Signed: only what this server named just now is answered.
        url = f"{self.base}/files/{isic_id}.jpg?signature={quote(isic_id[::-1])}"
        size = len(self.files[isic_id])
        files = {"full": {"url": url, "size": size}, "thumbnail_256": {"url": url, "size": 0}}
        return {**self.images[isic_id], "files": files}

    def search(self, query: dict[str, str], url: str) -> tuple[int, dict]:
        terms = [term.split(":") for term in query.get("query", "").split(" AND ") if term]
        found = []
        for isic_id, image in self.images.items():
            fields = flatten(image)
            if all(str(fields.get(name)) == value for name, value in terms):
                found.append(self.image(isic_id))
        position = 0
        if "cursor" in query:
            try:
                position = int(parse_qs(b64decode(query["cursor"], validate=True).decode())["p"][0])
            except (ValueError, KeyError):
                return 422, {"detail": "Invalid cursor."}
        limit = min(int(query.get("limit", self.page)), self.page)
        after, next_url = position + limit, None
        if after < len(found):
            cursor = b64encode(urlencode({"p": after}).encode()).decode()
            # As build_absolute_uri does behind a proxy that says nothing: another origin than the client's.
            next_url = (
                f"http://internal.invalid{url.partition('?')[0]}?{urlencode({**query, 'cursor': cursor})}"
            )
        count = len(found) if position == 0 else None
        page = {"count": count, "next": next_url, "previous": None, "results": found[position:after]}
        return 200, page

    def snapshot(self) -> bytes:
        rows = [flatten(image) for image in self.images.values()]
        for row in rows:
            del row["public"], row["bytes"]
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as bundle:
            for isic_id, data in self.files.items():
                bundle.writestr(zipfile.ZipInfo(f"images/{isic_id}.jpg"), data)
            bundle.writestr(zipfile.ZipInfo("metadata.csv"), text.getvalue())
        return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    archive: ArchiveServer

    def do_GET(self):
        archive = self.archive
        archive.seen.append(self.path)
        time.sleep(archive.delay_s)
        fault = archive.fault(self.path)
        try:
            match fault:
                case int(status):
                    self.send(status, b"{}")
                case (status, retry_after):
                    self.send(status, b"{}", **{"Retry-After": retry_after})
                case _:
                    self.send_with(fault, *self.find(archive))
        except ConnectionError:
            # A client that was interrupted, as some tests do.
            self.close_connection = True

    def find(self, archive: ArchiveServer) -> tuple[int, bytes]:
        split = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        if split.path == "/api/v2/images/search/":
            status, page = archive.search(query, self.path)
            return status, json.dumps(page).encode()
        if split.path == "/bucket/snapshots/ISIC_images.zip":
            return 200, archive.snapshot()
        named = re.fullmatch(r"/(api/v2/images|files|bucket/images)/(ISIC_\d+)(/|\.jpg)", split.path)
        if not named or named[2] not in archive.images:
            return 404, b"{}"
        if named[1] == "api/v2/images":
            return 200, json.dumps(archive.image(named[2])).encode()
        if named[1] == "files" and query.get("signature") != named[2][::-1]:
            return 403, b"expired"
        return 200, archive.files[named[2]]

    def send_with(self, fault: str | None, status: int, body: bytes):
        match fault:
            case None:
                self.send_range(status, body)
            case "reset":
                # Closed with data unsent and no time to linger: the client sees a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
            case "cut":
                partial = 206 if "Range" in self.headers else status
                self.send(partial, body[: len(body) // 2], length=len(body))
                self.close_connection = True
            case "short":
                self.send(status, body[: len(body) // 2])
            case "garbage":
                self.send(status, b"\xff\xd8\xff" + bytes(len(body) - 3))
            case "whole":
                self.send(status, body)
            case "hang":
                time.sleep(30)
            case str(url):
                self.send(302, b"", Location=url)

    def send_range(self, status: int, body: bytes):
        asked = re.fullmatch(r"bytes=(\d*)-(\d+)", self.headers.get("Range", ""))
        if status != 200 or not asked:
            self.send(status, body)
            return
        # Without a first byte the number is how many of the last are asked for (RFC 9110, 14.1.2).
        last = min(int(asked[2]), len(body) - 1) if asked[1] else len(body) - 1
        first = int(asked[1] or max(0, len(body) - int(asked[2])))
        self.send(206, body[first : last + 1], **{"Content-Range": f"bytes {first}-{last}/{len(body)}"})

    def send(self, status: int, body: bytes, length: int | None = None, **headers: str):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("ETag", f'"{len(self.archive.images)}"')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def archive_server(new_jpeg):
    archive = ArchiveServer(new_jpeg)
    handler = type("ThisHandler", (Handler,), {"archive": archive})
    with serving(handler) as port:
        archive.base = f"http://127.0.0.1:{port}"
        yield archive


@pytest.fixture
def pace() -> Pace:
    """Backoff as the product has it, a hundred times as fast."""
    return Pace(first_s=0.01, longest_s=0.1, longest_asked_s=1.0)


@pytest.fixture
def archive(archive_server, pace):
    with Http(archive_server.api, pace) as http:
        yield Archive(http, base=archive_server.api)


@pytest.fixture
def bucket(archive_server, pace):
    with Http(archive_server.bucket, pace) as http:
        yield Bucket(http, base=archive_server.bucket)

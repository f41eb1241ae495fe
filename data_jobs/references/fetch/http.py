"""HTTP as the sources need it: answers, ranges and streams, every fault either Transient or Refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import httpx

from data_jobs.references.fetch.errors import Refused, Transient
from data_jobs.references.fetch.retry import Pace, retry_after_s
from data_jobs.references.fetch.source import Body

#: Requests for answers that a listing needs are made more often than those for one image of many.
ATTEMPTS = 8
_CHUNK = 1 << 16
_TIMEOUT = httpx.Timeout(connect=15, read=60, write=30, pool=None)
_AGAIN = frozenset({408, 425, 429})
_GONE = frozenset({404, 410})


class Http:
    """A client for one source, usable by many threads; close it, or use it as a context manager."""

    def __init__(self, base: str, pace: Pace, *, connections: int = 16) -> None:
        self.pace = pace
        self._client = httpx.Client(
            base_url=base,
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            follow_redirects=True,
            max_redirects=3,
            headers={
                "user-agent": "pms-derm-cds (reference images)",
                # A JPEG does not shrink, and its length on the wire is to be that of the file.
                "accept-encoding": "identity",
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, url: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """Get a whole answer, once."""
        try:
            response = self._client.get(url, headers=headers)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _fault(error) from error
        _check(response)
        return response

    @contextmanager
    def stream(self, url: str) -> Iterator[Body]:
        """Open a body, once; its chunks raise Transient when the connection breaks."""
        try:
            with self._client.stream("GET", url) as response:
                _check(response)
                stated = response.headers.get("content-length", "")
                yield Body(response.iter_raw(_CHUNK), int(stated) if stated.isdecimal() else None)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _fault(error) from error


def _check(response: httpx.Response) -> None:
    status = response.status_code
    first = response.history[0] if response.history else response
    if response.url.scheme != first.url.scheme:
        raise Refused(f"{_place(first.request)} leads to an insecure place.", "insecure redirect")
    if response.is_success:
        return
    if status in _AGAIN or response.is_server_error:
        wait_s = retry_after_s(response.headers.get("retry-after"))
        raise Transient(f"{_place(response.request)} answered {status}.", f"status {status}", wait_s)
    cause = "gone" if status in _GONE else f"status {status}"
    raise Refused(f"{_place(response.request)} answered {status}.", cause)


def _fault(error: httpx.HTTPError | httpx.InvalidURL) -> Transient | Refused:
    if isinstance(error, httpx.TimeoutException):
        return Transient("No answer in time.", "timeout")
    if isinstance(error, httpx.RemoteProtocolError):
        return Transient(f"The answer broke off: {error}.", "broke off")
    if isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol):
        return Transient(f"No connection: {error}.", "no connection")
    return Refused(f"{type(error).__name__}: {error}.", type(error).__name__)


def _place(request: httpx.Request) -> str:
    # Not the query: a signed URL carries its signature there.
    return f"{request.url.host}{request.url.path}"

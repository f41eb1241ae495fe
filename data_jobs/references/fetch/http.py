"""HTTP as the sources need it: answers, ranges and images, tried again where that may help.

FetchError              the fetch cannot go on
├── ImageFailure        an image was not fetched, and why
│   ├── Transient       not now; another attempt may do
│   └── Refused         another attempt would not change it
└── Stopped             asked to stop
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
import threading
import time
from typing import Self, TypeVar

import httpx
import tenacity

from data_jobs.downloads import Bounds, NotTaken, TotalReached, place
from serve_app.domain.errors import DermError


class FetchError(DermError):
    """The fetch cannot go on."""

    code = "fetch_failed"


class ImageFailure(FetchError):
    """An image was not fetched.

    `cause`: a few words by which failures are counted. `wait_s`: what the server asked for (Retry-After), seconds.
    """

    def __init__(self, message: str = "", cause: str = "", wait_s: float | None = None) -> None:
        super().__init__(message)
        self.cause = cause or message
        self.wait_s = wait_s


class Transient(ImageFailure):
    """Not now; another attempt may do."""


class Refused(ImageFailure):
    """This image can not be had."""


class Stopped(FetchError):
    """Asked to stop."""


T = TypeVar("T")


class Pace:
    """When requests may be made: shared by all threads of a fetch, and where it is told to stop.

    A wait is a random part of a doubling limit ("full jitter": Brooker, AWS Architecture Blog, 2015), so that those
    who failed together do not come back together. What a server asks for (Retry-After), all threads heed, up to
    `longest_asked_s` seconds.
    """

    def __init__(
        self, *, first_s: float = 1.0, longest_s: float = 60.0, longest_asked_s: float = 300.0
    ) -> None:
        self._backoff = tenacity.wait_random_exponential(multiplier=first_s, max=longest_s)
        self._longest_asked_s = longest_asked_s
        self._stop = threading.Event()
        self._not_before = 0.0

    def stop(self) -> None:
        """Make every thread raise Stopped at its next step."""
        self._stop.set()

    def step(self) -> None:
        """Raise Stopped if told to stop."""
        if self._stop.is_set():
            raise Stopped

    def retry(self, attempt: Callable[[], T], attempts: int) -> T:
        """The result of `attempt`, made up to `attempts` times while it raises Transient; then that is raised."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            stop=tenacity.stop_after_attempt(attempts),
            wait=self._backoff,
            sleep=self._sleep,
            reraise=True,
        )
        result: T = retrying(self._once, attempt)
        return result

    def _once(self, attempt: Callable[[], T]) -> T:
        self._sleep(self._not_before - time.monotonic())
        try:
            return attempt()
        except Transient as error:
            if error.wait_s is not None:
                asked = min(error.wait_s, self._longest_asked_s)
                self._not_before = max(self._not_before, time.monotonic() + asked)
            raise

    def _sleep(self, seconds: float) -> None:
        self._stop.wait(max(0.0, seconds))
        self.step()


def retry_after_s(header: str | None, now: datetime | None = None) -> float | None:
    """Seconds that a Retry-After header asks for: a number or an HTTP date (RFC 9110, 10.2.3); None if neither."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        then = parsedate_to_datetime(header)
    except ValueError:
        return None
    then = then if then.tzinfo else then.replace(tzinfo=UTC)
    return max(0.0, (then - (now or datetime.now(UTC))).total_seconds())


#: Requests for answers that a listing needs are made more often than those for one image of many.
ATTEMPTS = 8
_TIMEOUT = httpx.Timeout(connect=15, read=60, write=30, pool=None)
_HEADERS = {"user-agent": "pms-derm-cds (reference images)"}
#: A page of a search or one image's entry, bytes; they have a few hundred KB.
_ANSWER_BYTES = 16 << 20
_AGAIN = frozenset({408, 425, 429})
_GONE = frozenset({404, 410})


class Http:
    """A client for one source, usable by many threads; close it, or use it as a context manager.

    `hosts` and `max_total_bytes`: see Bounds.
    """

    def __init__(
        self,
        base: str,
        pace: Pace,
        *,
        connections: int = 16,
        hosts: Iterable[str] = (),
        max_total_bytes: int | None = None,
    ) -> None:
        self.pace = pace
        self._bounds = Bounds(base, hosts, max_total_bytes)
        self._client = httpx.Client(
            base_url=base,
            timeout=_TIMEOUT,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            headers=_HEADERS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(
        self, url: str, headers: Mapping[str, str] | None = None, max_bytes: int = _ANSWER_BYTES
    ) -> httpx.Response:
        """Get a whole answer, once. Raises Transient, Refused, Stopped, or FetchError when nothing more may come."""
        try:
            with self._bounds.open(self._client, url, headers) as response:
                _check(response)
                if (
                    "range" in response.request.headers
                    and response.status_code != httpx.codes.PARTIAL_CONTENT
                ):
                    raise Refused(f"{response.url.host} serves no ranges.", "no ranges")
                data = bytearray()
                for block in self._bounds.read(response, max_bytes):
                    self.pace.step()
                    data += block
                return httpx.Response(
                    response.status_code,
                    headers=response.headers,
                    content=bytes(data),
                    request=response.request,
                )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _fault(error) from error
        except NotTaken as error:
            raise Refused(str(error), error.cause) from error
        except TotalReached as error:
            raise FetchError(f"{error} Run this again to go on, or with a larger --max-gb.") from error

    def read(self, url: str, max_bytes: int) -> bytes:
        """Read a body of at most so many bytes, once. Raises as `get` does."""
        return self.get(url, max_bytes=max_bytes).content


def _check(response: httpx.Response) -> None:
    status = response.status_code
    if response.is_success:
        return
    if status in _AGAIN or response.is_server_error:
        wait_s = retry_after_s(response.headers.get("retry-after"))
        raise Transient(f"{place(response.url)} answered {status}.", f"status {status}", wait_s)
    cause = "gone" if status in _GONE else f"status {status}"
    raise Refused(f"{place(response.url)} answered {status}.", cause)


def _fault(error: httpx.HTTPError | httpx.InvalidURL) -> Transient | Refused:
    if isinstance(error, httpx.TimeoutException):
        return Transient("No answer in time.", "timeout")
    if isinstance(error, httpx.RemoteProtocolError):
        return Transient(f"The answer broke off: {error}.", "broke off")
    if isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol):
        return Transient(f"No connection: {error}.", "no connection")
    return Refused(f"{type(error).__name__}: {error}.", type(error).__name__)

"""HTTP to the PMS: address, token, certificates, what may go wrong, and a circuit breaker for when it does.

Our own, because what is needed is forty lines: the libraries (purgatory, aiobreaker, pybreaker)
bring stores in Redis, factories and listeners, and count exceptions that here are answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
import logging
from pathlib import Path
import ssl
from time import monotonic
from typing import Any
from urllib.parse import quote

import httpx

from serve_app.domain.errors import IntegrityError, PmsUnavailable
from serve_app.domain.strict_json import read_json
from serve_app.private_files import read_private


class State(StrEnum):
    """Closed lets calls through, open refuses them, half-open lets one through as a trial."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class CircuitBreaker:
    """Opens after `failures` in a row; `rest_s` later one trial decides whether it closes again.

    Belongs to one event loop. `clock` gives seconds that never go back.
    """

    failures: int = 5
    rest_s: float = 10.0
    clock: Callable[[], float] = monotonic
    _in_a_row: int = field(default=0, init=False)
    _opened_at: float | None = field(default=None, init=False)
    _trial_until: float = field(default=0.0, init=False)

    @property
    def state(self) -> State:
        """What the next call will find."""
        if self._opened_at is None:
            return State.CLOSED
        now = self.clock()
        if now < self._opened_at + self.rest_s or now < self._trial_until:
            return State.OPEN
        return State.HALF_OPEN

    def enter(self) -> bool:
        """Ask whether a call may go through; of those that come while half-open, one may.

        A trial that never reports (its task was cancelled) counts as failed after another rest.
        """
        state = self.state
        if state is State.HALF_OPEN:
            self._trial_until = self.clock() + self.rest_s
        return state is not State.OPEN

    def succeed(self) -> None:
        """Note an answer: whatever it said, somebody is there."""
        self._in_a_row, self._opened_at, self._trial_until = 0, None, 0.0

    def fail(self) -> None:
        """Note that there was no answer."""
        self._in_a_row += 1
        if self._in_a_row >= self.failures:
            self._opened_at, self._trial_until = self.clock(), 0.0


#: More than any record of a patient; a longer answer is not one.
MAX_ANSWER_BYTES = 256 * 1024
_CONNECTIONS = httpx.Limits(max_connections=32, max_keepalive_connections=8)


@dataclass(frozen=True, slots=True)
class PmsAnswer:
    """A status and, where the body is a JSON object, that."""

    status: int
    body: dict[str, Any] | None = field(repr=False)


class PmsClient:
    """Connections to one PMS. Belongs to the event loop that uses it first.

    `token_file` holds the bearer token (mode 0600) and is read again for every request: whoever
    renews it just writes it. `ca_file` holds the certificates to trust instead of the system's.
    """

    def __init__(self, url: str, *, token_file: Path | None = None, ca_file: Path | None = None) -> None:
        # httpx logs every URL, and with it the patient, at INFO; httpcore headers at DEBUG.
        for name in ("httpx", "httpcore"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._token_file = token_file
        self._client = httpx.AsyncClient(
            base_url=url,
            verify=ssl.create_default_context(cafile=str(ca_file) if ca_file else None),
            limits=_CONNECTIONS,
            # Patients' data goes where the settings say: through no proxy of the environment, behind no redirect.
            trust_env=False,
            follow_redirects=False,
            headers={"Accept": "application/json", "User-Agent": "derm-cds"},
        )

    async def get(self, *path: str, timeout_s: float) -> PmsAnswer:
        """Ask for a resource; PmsUnavailable when nothing usable came back in time."""
        return await self._send("GET", path, timeout_s)

    async def post(
        self,
        *path: str,
        body: Mapping[str, Any],
        idempotency_key: str,
        timeout_s: float,
        media_type: str = "application/json",
    ) -> PmsAnswer:
        """Send a resource; PmsUnavailable when it is not known what became of it."""
        headers = {"Idempotency-Key": idempotency_key, "Content-Type": media_type}
        return await self._send("POST", path, timeout_s, body, headers)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _send(
        self,
        method: str,
        path: tuple[str, ...],
        timeout_s: float,
        body: Mapping[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> PmsAnswer:
        url = "/".join(quote(part, safe="") for part in path)
        try:
            # httpx's own timeout is for each step; this one is for all of it.
            async with asyncio.timeout(timeout_s):
                headers = (headers or {}) | await self._authorization()
                async with self._client.stream(
                    method, url, json=body, headers=headers, timeout=timeout_s
                ) as response:
                    return PmsAnswer(response.status_code, await _read(response))
        except (TimeoutError, httpx.TimeoutException):
            raise PmsUnavailable("timeout") from None
        except (httpx.HTTPError, httpx.StreamError, ssl.SSLError) as error:
            # Without its cause, whose request holds the URL and the token.
            raise PmsUnavailable(f"connection_{type(error).__name__}") from None

    async def _authorization(self) -> dict[str, str]:
        if self._token_file is None:
            return {}
        try:
            token = (await asyncio.to_thread(read_private, self._token_file)).decode().strip()
        except (OSError, UnicodeDecodeError):
            raise PmsUnavailable("token_file_unreadable") from None
        except IntegrityError:
            raise PmsUnavailable("token_file_not_private") from None
        return {"Authorization": f"Bearer {token}"}


async def _read(response: httpx.Response) -> dict[str, Any] | None:
    """Read a bounded body; None unless it is a JSON object without a key twice."""
    received = bytearray()
    async for chunk in response.aiter_bytes():
        received += chunk
        if len(received) > MAX_ANSWER_BYTES:
            raise PmsUnavailable("answer_too_large")
    try:
        body = read_json(bytes(received))
    except ValueError:
        return None
    return body if isinstance(body, dict) else None

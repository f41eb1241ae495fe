"""HTTP to the PMS: one place for its address, its token, its certificates and what may go wrong."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
import json
import logging
from pathlib import Path
import ssl
from typing import Any
from urllib.parse import quote

import httpx

from serve_app.domain.errors import IntegrityError, PmsUnavailable
from serve_app.domain.strict_json import read_json
from serve_app.security.private_files import read_private

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
        return await self._send("GET", path, {}, None, timeout_s)

    async def post(
        self, *path: str, body: dict[str, Any], idempotency_key: str, timeout_s: float
    ) -> PmsAnswer:
        """Send a resource; PmsUnavailable when it is not known what became of it."""
        content = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        return await self._send("POST", path, headers, content, timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _send(
        self,
        method: str,
        path: tuple[str, ...],
        headers: dict[str, str],
        content: bytes | None,
        timeout_s: float,
    ) -> PmsAnswer:
        url = "/".join(quote(part, safe="") for part in path)
        try:
            # httpx's own timeout is for each step; this one is for all of it.
            async with asyncio.timeout(timeout_s):
                headers = headers | await self._authorization()
                async with self._client.stream(
                    method, url, headers=headers, content=content, timeout=timeout_s
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

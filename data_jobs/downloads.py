"""How far a download may lead, and how much it may bring.

The server that an operator names may be anywhere, on this machine too. Where a server leads to may not: only listed
hosts, by HTTPS, and no address of this machine or of a private network. Without that, an archive that is taken over
reaches what only this machine can. Redirections are followed here, because httpx reads their bodies without a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import IPv6Address, ip_address
import socket
import threading
import time

import httpx

from serve_app.domain.errors import DermError


class NotTaken(DermError):
    """A download leads where it may not, or brings what it may not. `cause`: a few words by which such are counted."""

    code = "download_refused"

    def __init__(self, message: str = "", cause: str = "") -> None:
        super().__init__(message)
        self.cause = cause


class TotalReached(DermError):
    """All downloads together have brought as much as they may."""

    code = "download_total"


_MAX_REDIRECTS = 3
#: After so many seconds a body must have come, or come at this rate on the whole, bytes a second.
PATIENCE_S = 60.0
SLOWEST = 16 * 1024


class Bounds:
    """For all downloads that begin at the origin of `base`, made by many threads.

    `hosts`: where else they may lead, each with its subdomains. `max_total_bytes`: of all bodies together.
    """

    def __init__(self, base: str, hosts: Iterable[str] = (), max_total_bytes: int | None = None) -> None:
        self._base = httpx.URL(base)
        self._hosts = frozenset({self._base.host, *(host.lower() for host in hosts)})
        self._max_total_bytes = max_total_bytes
        self._total = 0
        self._lock = threading.Lock()

    @contextmanager
    def open(
        self, client: httpx.Client, url: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[httpx.Response]:
        """Get `url`, and what it leads to, without a body yet. Raises NotTaken, or httpx's errors."""
        asked = {"Accept-Encoding": "identity", **(headers or {})}
        request = client.build_request("GET", url, headers=asked)
        for _ in range(_MAX_REDIRECTS + 1):
            self.check(request.url)
            response = client.send(request, stream=True, follow_redirects=False)
            try:
                if response.next_request is None:
                    yield response
                    return
                request = response.next_request
            finally:
                response.close()
        raise NotTaken(f"{place(request.url)}: more than {_MAX_REDIRECTS} redirections.", "redirections")

    def check(self, url: httpx.URL) -> None:
        """Raise NotTaken unless a request may go there.

        A name that does not resolve passes: the connection will say so, or a proxy knows it.
        """
        if _origin(url) == _origin(self._base):
            return
        if url.scheme != "https":
            raise NotTaken(f"{place(url)}: only https is taken, not {url.scheme}.", "insecure place")
        if not any(url.host == host or url.host.endswith(f".{host}") for host in self._hosts):
            raise NotTaken(f"{place(url)}: the host is not allowed (--allow-host).", "host not allowed")
        with suppress(socket.gaierror, UnicodeError):
            for *_, address in socket.getaddrinfo(url.host, url.port or 443, type=socket.SOCK_STREAM):
                if not _is_public(str(address[0])):
                    raise NotTaken(f"{place(url)}: {address[0]} is not on the internet.", "private address")

    def read(self, response: httpx.Response, max_bytes: int) -> Iterator[bytes]:
        """Read the body as it comes, no further than the limits. Raises NotTaken, TotalReached, or httpx's errors."""
        whole = f"{place(response.url)} is larger than {max_bytes} bytes."
        stated = response.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > max_bytes:
            raise NotTaken(whole, "too large")
        if response.headers.get("content-encoding", "identity") != "identity":
            raise NotTaken(f"{place(response.url)} came packed, which was not asked for.", "packed")
        size, start = 0, time.monotonic()
        for block in response.iter_raw():
            size += len(block)
            if size > max_bytes:
                raise NotTaken(whole, "too large")
            with self._lock:
                self._total += len(block)
            if self._max_total_bytes is not None and self._total > self._max_total_bytes:
                raise TotalReached(f"All downloads together have more than {self._max_total_bytes} bytes.")
            if time.monotonic() - start > PATIENCE_S + size / SLOWEST:
                raise httpx.ReadTimeout("The answer came too slowly.", request=response.request)
            yield block


def place(url: httpx.URL) -> str:
    """Where something is, for people: not the query, where a signed URL carries its signature."""
    return f"{url.host}{url.path}"


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    # httpx leaves out the port that a scheme has anyway.
    return url.scheme, url.host, url.port


def _is_public(text: str) -> bool:
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address.sixtofour or address
    return address.is_global and not address.is_multicast

"""A file behind HTTP that can be read anywhere, by range requests: enough for `zipfile` to open it."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

import httpx

from data_jobs.references.fetch.errors import FetchError, Refused, Transient
from data_jobs.references.fetch.http import ATTEMPTS, Http

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Read at once: a round trip costs about as much as a megabyte.
BLOCK = 4 * 1024 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class RemoteFile(io.RawIOBase):
    """One version of a file: FetchError when it is replaced while it is read. Wrap it in a BufferedReader."""

    def __init__(self, http: Http, url: str) -> None:
        self._http = http
        self._url = url
        self._position = 0
        first = self._ask(0, 0)
        self._version = first.headers.get("etag")
        self._size = int(_content_range(first)[2])

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position, bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, also past the end."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer as far as the file goes."""
        view = memoryview(buffer)
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        response = self._ask(self._position, end - 1)
        if response.headers.get("etag") != self._version:
            raise FetchError(f"{self._url} was replaced while it was read. Run this again.")
        view[: len(response.content)] = response.content
        self._position += len(response.content)
        return len(response.content)

    def _ask(self, first: int, last: int) -> httpx.Response:
        return self._http.pace.insist(lambda: self._ask_once(first, last), ATTEMPTS)

    def _ask_once(self, first: int, last: int) -> httpx.Response:
        response = self._http.get(self._url, headers={"range": f"bytes={first}-{last}"})
        start, end, _ = _content_range(response)
        if (start, end) != (first, last) or len(response.content) != last - first + 1:
            raise Transient(f"{self._url}: another range than asked for.", "wrong range")
        return response


def _content_range(response: httpx.Response) -> tuple[int, int, int]:
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if response.status_code != httpx.codes.PARTIAL_CONTENT or found is None:
        raise Refused(f"{response.request.url.host} serves no ranges.", "no ranges")
    first, last, size = map(int, found.groups())
    return first, last, size

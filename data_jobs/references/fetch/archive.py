"""The ISIC Archive through its API, version 2 (ImageMarkup/isic, `isic/core/api/image.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit

from data_jobs.references.fetch.errors import FetchError, Refused, Transient
from data_jobs.references.fetch.http import ATTEMPTS, Http
from data_jobs.references.fetch.source import Body, Page

BASE = "https://api.isic-archive.com/api/v2/"
#: The archive's search language; eligibility looks at every image again.
QUERY = "image_type:dermoscopic"
#: The most that the archive gives on one page.
PAGE = "100"


class Archive:
    """Images that a search finds, all of them or those of some collections (ids, comma-separated)."""

    name = "archive"
    attempts = 6

    def __init__(self, http: Http, *, base: str = BASE, query: str = QUERY, collections: str = "") -> None:
        self._http = http
        self._base = base
        self._query = query
        self._collections = collections

    def parameters(self) -> dict[str, str]:
        """See Source."""
        return {"base": self._base, "query": self._query, "collections": self._collections}

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Search results, 100 images a page; a page's cursor is the query of its `next`."""
        asked = {"query": self._query, "collections": self._collections, "limit": PAGE}
        query = cursor or urlencode({name: value for name, value in asked.items() if value})
        while True:
            answer = self._json(f"images/search/?{query}")
            found, after = answer.get("results"), answer.get("next")
            if not isinstance(found, list) or not (after is None or isinstance(after, str)):
                raise FetchError("The archive's search answered with something that is no page of images.")
            # Of `next` only the query: where to send it is ours to say, not the answer's.
            asked_before, query = query, urlsplit(after).query if after else ""
            if query == asked_before:
                raise FetchError("The archive's search names a page as the one that follows itself.")
            records = [flatten(image) for image in found]
            yield Page(records, query or None, total=answer.get("count"))
            if not query:
                return

    @contextmanager
    def open(self, isic_id: str) -> Iterator[Body]:
        """Open an image at the URL that the archive gives for it now: such URLs are signed and expire."""
        image = self._json_once(f"images/{isic_id}/")
        try:
            url, size = image["files"]["full"]["url"], int(image["files"]["full"]["size"])
            public = image["public"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"The archive names no file for {isic_id}.", "no file") from error
        if public is not True:
            raise Refused(f"{isic_id} is not public any more.", "not public")
        scheme = f"{urlsplit(self._base).scheme}://"
        if not isinstance(url, str) or not url.startswith(scheme):
            raise Refused(f"The archive names no secure URL for {isic_id}.", "no secure URL")
        with self._http.stream(url) as body:
            if body.length not in {None, size}:
                raise Transient(f"{isic_id}: {body.length} bytes announced, not {size}.", "wrong length")
            yield Body(body.chunks, size)

    def _json(self, url: str) -> dict[str, Any]:
        return self._http.pace.insist(lambda: self._json_once(url), ATTEMPTS)

    def _json_once(self, url: str) -> dict[str, Any]:
        try:
            answer = self._http.get(url).json()
        except ValueError as error:
            raise Transient(f"{url.partition('?')[0]}: the answer is no JSON.", "no JSON") from error
        if not isinstance(answer, dict):
            raise Transient(f"{url.partition('?')[0]}: the answer is no JSON object.", "no JSON")
        return answer


def flatten(image: Mapping[str, Any]) -> dict[str, object]:
    """One image as its row of the archive's metadata.csv would be, with `public` and `bytes`.

    Fields are looked for one by one: what an image lacks or has in another shape is not there.
    """
    found: dict[str, object] = {
        name: image.get(name) for name in ("isic_id", "copyright_license", "attribution", "public")
    }
    metadata = image.get("metadata")
    for part in ("acquisition", "clinical"):
        fields = metadata.get(part) if isinstance(metadata, Mapping) else None
        if isinstance(fields, Mapping):
            found |= {
                str(name): value for name, value in fields.items() if not isinstance(value, (dict, list))
            }
    files = image.get("files")
    full = files.get("full") if isinstance(files, Mapping) else None
    if isinstance(full, Mapping):
        found["bytes"] = full.get("size")
    return found

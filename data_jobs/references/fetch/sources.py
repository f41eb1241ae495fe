"""Where reference images come from: the ISIC Archive, its bucket in AWS Open Data, or a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
import csv
from dataclasses import dataclass
import io
from itertools import islice
import os
from pathlib import Path
import re
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit
import zipfile

import httpx
from remotezip import RemoteZip

from data_jobs.references.catalogue import IMAGES, metadata_file, metadata_rows
from data_jobs.references.fetch.http import ATTEMPTS, Body, FetchError, Http, Refused, Transient
from serve_app.domain.diagnosis import TRAINED


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a source's images: the archive's fields, flat, with `public` and `bytes` where known.

    `cursor`: where the next page begins, None where a listing can not be resumed there.
    `total`: images in all pages, where the source says.
    """

    records: Sequence[Mapping[str, object]]
    cursor: str | None = None
    total: int | None = None


class Source(Protocol):
    """The archive, its bucket, or a folder."""

    name: str
    #: How often an image is tried before it counts as failed.
    attempts: int

    def parameters(self) -> dict[str, str]:
        """What its listing depends on, to compare one fetch with an earlier one into the same folder."""

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """List its images, from a page's cursor or from the start. Raises FetchError."""

    def open(self, isic_id: str) -> AbstractContextManager[Body]:
        """Open an image. Raises Transient or Refused, also while the chunks are read."""


ARCHIVE_BASE = "https://api.isic-archive.com/api/v2/"
#: The archive's search language; eligibility looks at every image again.
QUERY = "image_type:dermoscopic"
#: The most that the archive gives on one page.
PAGE = "100"


class Archive:
    """Images that a search finds, all of them or those of some collections (ids, comma-separated).

    The archive's API, version 2 (ImageMarkup/isic, `isic/core/api/image.py`).
    """

    name = "archive"
    attempts = 6

    def __init__(
        self, http: Http, *, base: str = ARCHIVE_BASE, query: str = QUERY, collections: str = ""
    ) -> None:
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


class _Ranges:
    """The `requests` session of RemoteZip, as far as it uses one: our own client, its retries, one version of the file."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._version: str | None = None

    def get(self, url: str, *, headers: Mapping[str, str], **_: object) -> _Range:
        """One range. Raises FetchError when the file was replaced since the first one."""
        found = self._http.pace.insist(lambda: self._ask(url, headers), ATTEMPTS)
        version = found.headers.get("etag", "")
        if self._version not in {None, version}:
            raise FetchError(f"{url} was replaced while it was read. Run this again.")
        self._version = version
        return _Range(io.BytesIO(found.content), {"Content-Range": found.headers["content-range"]})

    def _ask(self, url: str, headers: Mapping[str, str]) -> httpx.Response:
        response = self._http.get(url, headers=headers)
        stated = re.fullmatch(r"bytes (\d+)-(\d+)/\d+", response.headers.get("content-range", ""))
        if response.status_code != httpx.codes.PARTIAL_CONTENT or stated is None:
            raise Refused(f"{response.request.url.host} serves no ranges.", "no ranges")
        if len(response.content) != int(stated[2]) - int(stated[1]) + 1:
            raise Transient(f"{url}: another range than asked for.", "wrong range")
        return response


@dataclass(frozen=True, slots=True)
class _Range:
    raw: io.BytesIO
    headers: Mapping[str, str]

    def raise_for_status(self) -> None:
        """Nothing: `Http` has raised already."""


BUCKET_BASE = "https://isic-archive.s3.us-east-1.amazonaws.com/"
SNAPSHOT = "snapshots/ISIC_images.zip"
_PAGE = 1000


class Bucket:
    """The public images of the latest snapshot, read anonymously.

    The bucket has every public image as `images/<isic_id>.jpg`, and a ZIP of all of them with their `metadata.csv`,
    made from time to time (ImageMarkup/isic, `isic/core/services/snapshot`). Of that ZIP, 60 GB, only the directory
    and the metadata are read.
    """

    name = "bucket"
    attempts = 6

    def __init__(self, http: Http, *, base: str = BUCKET_BASE) -> None:
        self._http = http
        self._base = base

    def parameters(self) -> dict[str, str]:
        """See Source."""
        return {"base": self._base}

    def pages(self, cursor: str | None) -> Iterator[Page]:  # noqa: ARG002
        """The snapshot's metadata, a thousand rows a page; a listing begins anew each time."""
        try:
            with (
                RemoteZip(SNAPSHOT, session=_Ranges(self._http)) as snapshot,
                snapshot.open("metadata.csv") as file,
            ):
                sizes = {entry.filename: entry.file_size for entry in snapshot.infolist()}
                text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                rows = csv.DictReader(text)
                while records := [_record(row, sizes) for row in islice(rows, _PAGE)]:
                    yield Page(records, total=len(sizes))
        except (zipfile.BadZipFile, KeyError, csv.Error, UnicodeDecodeError) as error:
            raise FetchError(f"{self._base}{SNAPSHOT} is no snapshot of the archive: {error}.") from error

    @contextmanager
    def open(self, isic_id: str) -> Iterator[Body]:
        """Open the image's own object, not the snapshot's copy, which may be older."""
        with self._http.stream(f"images/{isic_id}.jpg") as body:
            yield body


def _record(row: Mapping[str, str], sizes: Mapping[str, int]) -> Mapping[str, object]:
    # Everything in the snapshot is public; what has no JPEG there is none of ours.
    name = f"images/{row.get('isic_id')}.jpg"
    return {**row, "public": "true", "bytes": sizes.get(name)}


_CHUNK = 1 << 20


class Folder:
    """Images in `images/` or beside the metadata file, whose columns are the catalogue's or the archive's."""

    name = "folder"
    # A file does not get better by being read again.
    attempts = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._paths: dict[str, Path] = {}

    def parameters(self) -> dict[str, str]:
        """See Source."""
        return {"folder": str(self._folder)}

    def pages(self, cursor: str | None) -> Iterator[Page]:  # noqa: ARG002
        """Everything in one page."""
        file = metadata_file(self._folder)
        try:
            rows = metadata_rows(file)
        except (OSError, ValueError, csv.Error) as error:
            raise FetchError(f"{file} can not be read: {error}.") from error
        sizes = _sizes(self._folder)
        yield Page([self._record(row, sizes) for row in rows], total=len(rows))

    @contextmanager
    def open(self, isic_id: str) -> Iterator[Body]:
        """Open an image's file."""
        path = self._find(isic_id)
        try:
            with path.open("rb") as file:
                yield Body(iter(lambda: file.read(_CHUNK), b""), path.stat().st_size)
        except OSError as error:
            raise Refused(f"{path} can not be read: {error.strerror}.", "can not be read") from error

    def _record(self, row: Mapping[str, object], sizes: Mapping[str, int]) -> Mapping[str, object]:
        record = dict(row)
        if record.get("diagnosis") in TRAINED:
            # Ours, not the archive's: a catalogue holds dermoscopic images only, and need not say so.
            record["image_type"] = record.get("image_type") or "dermoscopic"
        isic_id = str(record.get("isic_id"))
        if record.get("path"):
            self._paths[isic_id] = self._folder / str(record["path"])
        # Whether it can be had shows when it is fetched: here it would be left out without a word.
        record["bytes"] = next((sizes[name] for name in _names(isic_id) if name in sizes), None)
        return record

    def _find(self, isic_id: str) -> Path:
        folder = self._folder
        for path in (self._paths.get(isic_id), *(folder / name for name in _names(isic_id))):
            if path is not None and path.is_file() and path.resolve().is_relative_to(folder):
                return path
        raise Refused(f"{folder} has no image of {isic_id}.", "no file")


def _names(isic_id: str) -> tuple[str, ...]:
    return f"{IMAGES}/{isic_id}.jpg", f"{isic_id}.jpg", f"{isic_id}.JPG"


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files in the folder and its `images/`, by their names relative to the folder."""
    return {
        os.path.relpath(file.path, folder): file.stat().st_size
        for place in (folder, folder / IMAGES)
        if place.is_dir()
        for file in os.scandir(place)
        if file.is_file()
    }

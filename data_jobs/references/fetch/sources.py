"""Where reference images come from: the ISIC Archive, its bucket in AWS Open Data, or a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
import csv
from dataclasses import dataclass
from functools import partial
import io
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode, urlsplit
import zipfile

from remotezip import RemoteZip, RemoteZipError

from data_jobs.references.catalogue import ARCHIVE_LIMITS, IMAGES, metadata_file, metadata_rows
from data_jobs.references.fetch.http import ATTEMPTS, FetchError, Http, Refused, Transient
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


class Source(ABC):
    """The archive, its bucket, or a folder.

    `attempts`: how often an image is tried before it counts as failed. `parameters`: what the listing depends on, to
    compare one fetch with an earlier one into the same folder.
    """

    name: str
    attempts = 6
    parameters: dict[str, str]

    @abstractmethod
    def pages(self, cursor: str | None) -> Iterator[Page]:
        """List its images, from a page's cursor or from the start. Raises FetchError."""

    @abstractmethod
    def read(self, isic_id: str) -> bytes:
        """Read an image, in one attempt. Raises Transient, Refused or Stopped."""


#: Where the archive's answers lead for images, with their subdomains.
HOSTS = ("isic-archive.com", "isic-archive.s3.amazonaws.com", "isic-archive.s3.us-east-1.amazonaws.com")
ARCHIVE_BASE = "https://api.isic-archive.com/api/v2/"
#: The archive's search language; eligibility looks at every image again.
QUERY = "image_type:dermoscopic"
#: The most that the archive gives on one page.
PAGE = "100"


class Archive(Source):
    """Images that a search finds, all of them or those of some collections (ids, comma-separated).

    The archive's API, version 2 (ImageMarkup/isic, `isic/core/api/image.py`).
    """

    name = "archive"

    def __init__(
        self, http: Http, *, base: str = ARCHIVE_BASE, query: str = QUERY, collections: str = ""
    ) -> None:
        self._http = http
        self._base = base
        self.parameters = {"base": base, "query": query, "collections": collections}

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """Search results, 100 images a page; a page's cursor is the query of its `next`."""
        asked = {name: self.parameters[name] for name in ("query", "collections")} | {"limit": PAGE}
        query = cursor or urlencode({name: value for name, value in asked.items() if value})
        while True:
            url = f"images/search/?{query}"
            answer = self._http.pace.retry(partial(self._json, url), ATTEMPTS)
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

    def read(self, isic_id: str) -> bytes:
        """Read an image from the URL that the archive gives for it now: such URLs are signed and expire."""
        image = self._json(f"images/{isic_id}/")
        try:
            url, size = str(image["files"]["full"]["url"]), int(image["files"]["full"]["size"])
            public = image["public"]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"The archive names no file for {isic_id}.", "no file") from error
        if public is not True:
            raise Refused(f"{isic_id} is not public any more.", "not public")
        data = self._http.read(url, ARCHIVE_LIMITS.max_bytes)
        if len(data) != size:
            raise Transient(f"{isic_id}: {len(data)} bytes came, not {size}.", "wrong length")
        return data

    def _json(self, url: str) -> dict[str, Any]:
        try:
            answer = self._http.get(url).json()
        except ValueError as error:
            raise Transient(f"{url.partition('?')[0]}: the answer is no JSON.", "no JSON") from error
        return dict(_table(answer))


def flatten(image: Mapping[str, Any]) -> dict[str, object]:
    """One image as its row of the archive's metadata.csv would be, with `public` and `bytes`.

    What an image lacks or has in another shape is not there.
    """
    metadata, files = _table(image.get("metadata")), _table(image.get("files"))
    found = {name: image.get(name) for name in ("isic_id", "copyright_license", "attribution", "public")}
    for part in ("acquisition", "clinical"):
        fields = _table(metadata.get(part)).items()
        found |= {str(name): value for name, value in fields if not isinstance(value, (dict, list))}
    return found | {"bytes": _table(files.get("full")).get("size")}


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


#: The snapshot's directory, and its metadata packed and unpacked, bytes; each has some 100 MB.
_RANGE_BYTES = 1 << 29
_METADATA_BYTES = 1 << 31
_METADATA = "metadata.csv"


class _Ranges:
    """The `requests` session of RemoteZip, as far as it uses one: our own client, its retries, one version of the file."""

    def __init__(self, http: Http) -> None:
        self._http = http
        self._version: str | None = None

    def get(self, url: str, *, headers: Mapping[str, str], **_: object) -> SimpleNamespace:
        """One range. Raises FetchError when the file was replaced since the first one."""
        found = self._http.pace.retry(
            lambda: self._http.get(url, headers=headers, max_bytes=_RANGE_BYTES), ATTEMPTS
        )
        version = found.headers.get("etag", "")
        if self._version not in {None, version}:
            raise FetchError(f"{url} was replaced while it was read. Run this again.")
        self._version = version
        return SimpleNamespace(
            raw=io.BytesIO(found.content), headers=found.headers, raise_for_status=lambda: None
        )


BUCKET_BASE = "https://isic-archive.s3.us-east-1.amazonaws.com/"
SNAPSHOT = "snapshots/ISIC_images.zip"
_PAGE = 1000


class Bucket(Source):
    """The public images of the latest snapshot, read anonymously.

    The bucket has every public image as `images/<isic_id>.jpg`, and a ZIP of all of them with their `metadata.csv`,
    made from time to time (ImageMarkup/isic, `isic/core/services/snapshot`). Of that ZIP, 60 GB, only the directory
    and the metadata are read.
    """

    name = "bucket"

    def __init__(self, http: Http, *, base: str = BUCKET_BASE) -> None:
        self._http = http
        self.parameters = {"base": base}

    def pages(self, cursor: str | None) -> Iterator[Page]:  # noqa: ARG002
        """The snapshot's metadata, a thousand rows a page; a listing begins anew each time."""
        try:
            with RemoteZip(SNAPSHOT, session=_Ranges(self._http)) as snapshot:
                sizes = {entry.filename: entry.file_size for entry in snapshot.infolist()}
                # Unpacking ends at the size that the directory states.
                if sizes.get(_METADATA, 0) > _METADATA_BYTES:
                    raise FetchError(f"{_METADATA} of {SNAPSHOT} is larger than {_METADATA_BYTES} bytes.")
                with snapshot.open(_METADATA) as file:
                    rows = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))
                    while records := [_record(row, sizes) for row in islice(rows, _PAGE)]:
                        yield Page(records, total=len(sizes))
        except (zipfile.BadZipFile, RemoteZipError, KeyError, csv.Error, UnicodeDecodeError) as error:
            raise FetchError(
                f"{self.parameters['base']}{SNAPSHOT} is no snapshot of the archive: {error}."
            ) from error

    def read(self, isic_id: str) -> bytes:
        """Read the image's own object, not the snapshot's copy, which may be older."""
        return self._http.read(f"images/{isic_id}.jpg", ARCHIVE_LIMITS.max_bytes)


def _record(row: Mapping[str, str], sizes: Mapping[str, int]) -> Mapping[str, object]:
    # Everything in the snapshot is public; what has no JPEG there is none of ours.
    name = f"images/{row.get('isic_id')}.jpg"
    return {**row, "public": "true", "bytes": sizes.get(name)}


class Folder(Source):
    """Images in `images/` or beside the metadata file, whose columns are the catalogue's or the archive's."""

    name = "folder"
    # A file does not get better by being read again.
    attempts = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._stated: dict[str, str] = {}
        self.parameters = {"folder": str(self._folder)}

    def pages(self, cursor: str | None) -> Iterator[Page]:  # noqa: ARG002
        """Everything in one page."""
        file = metadata_file(self._folder)
        try:
            rows = metadata_rows(file)
        except (OSError, ValueError, csv.Error) as error:
            raise FetchError(f"{file} can not be read: {error}.") from error
        self._stated = {str(row.get("isic_id")): str(row["path"]) for row in rows if row.get("path")}
        yield Page([self._record(row) for row in rows], total=len(rows))

    def read(self, isic_id: str) -> bytes:
        """Read an image's file."""
        path = self._find(isic_id)
        if path is None:
            raise Refused(f"{self._folder} has no image of {isic_id}.", "no file")
        try:
            if path.stat().st_size > ARCHIVE_LIMITS.max_bytes:
                raise Refused(f"{path} has more than {ARCHIVE_LIMITS.max_bytes} bytes.", "too large")
            return path.read_bytes()
        except OSError as error:
            raise Refused(f"{path} can not be read: {error.strerror}.", "can not be read") from error

    def _record(self, row: Mapping[str, object]) -> Mapping[str, object]:
        path = self._find(str(row.get("isic_id")))
        # Whether it can be had shows when it is fetched: here it would be left out without a word.
        record = {**row, "bytes": path.stat().st_size if path else None}
        if row.get("diagnosis") in TRAINED and not row.get("image_type"):
            # Ours, not the archive's: a catalogue holds dermoscopic images only, and need not say so.
            record["image_type"] = "dermoscopic"
        return record

    def _find(self, isic_id: str) -> Path | None:
        usual = f"{IMAGES}/{isic_id}.jpg", f"{isic_id}.jpg", f"{isic_id}.JPG"
        for name in (self._stated.get(isic_id, usual[0]), *usual):
            path = self._folder / name
            with suppress(OSError):  # a name that is too long
                if path.is_file() and path.resolve().is_relative_to(self._folder):
                    return path
        return None

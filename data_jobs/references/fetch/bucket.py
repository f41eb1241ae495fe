"""The archive's bucket in AWS Open Data, read anonymously.

It has every public image as `images/<isic_id>.jpg`, and a ZIP of all of them with their `metadata.csv`, made from
time to time (ImageMarkup/isic, `isic/core/services/snapshot`). Of that ZIP, 60 GB, only the directory and the
metadata are read; they say what there is and how large it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
import csv
import io
from itertools import islice
import zipfile

from data_jobs.references.fetch.errors import FetchError
from data_jobs.references.fetch.http import Http
from data_jobs.references.fetch.remote_file import BLOCK, RemoteFile
from data_jobs.references.fetch.source import Body, Page

BASE = "https://isic-archive.s3.us-east-1.amazonaws.com/"
SNAPSHOT = "snapshots/ISIC_images.zip"
_PAGE = 1000


class Bucket:
    """The public images of the latest snapshot."""

    name = "bucket"
    attempts = 6

    def __init__(self, http: Http, *, base: str = BASE) -> None:
        self._http = http
        self._base = base

    def parameters(self) -> dict[str, str]:
        """See Source."""
        return {"base": self._base}

    def pages(self, cursor: str | None) -> Iterator[Page]:  # noqa: ARG002
        """The snapshot's metadata, a thousand rows a page; a listing begins anew each time."""
        remote = io.BufferedReader(RemoteFile(self._http, SNAPSHOT), BLOCK)
        try:
            with zipfile.ZipFile(remote) as snapshot, snapshot.open("metadata.csv") as file:
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

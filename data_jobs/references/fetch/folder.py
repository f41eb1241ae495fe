"""A folder that has the images already: one of this project's, or what `isic image download` leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
import csv
import os
from pathlib import Path

import pyarrow.parquet as pq

from data_jobs.references.catalogue import IMAGES, metadata_file
from data_jobs.references.fetch.errors import FetchError, Refused
from data_jobs.references.fetch.source import Body, Page
from serve_app.domain.diagnosis import TRAINED

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
            rows = _rows(file)
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


def _rows(file: Path) -> list[Mapping[str, object]]:
    if file.suffix == ".parquet":
        return list(pq.read_table(file).to_pylist())
    with file.open(newline="", encoding="utf-8-sig") as opened:
        return list(csv.DictReader(opened))

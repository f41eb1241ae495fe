"""A backup's folder: written beside its place and moved there whole, with a manifest that says what it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import file_digest
import json
import os
from pathlib import Path
import shutil
from typing import Any

from serve_app.domain.errors import Conflict, DermError, IntegrityError, NotFound
from serve_app.private_files import write_private

#: What a manifest of this version of the service looks like.
FORMAT = 1

_MANIFEST = "manifest.json"
_SPARE_BYTES = 64 * 1024**2


class BackupFailed(DermError):
    """The backup could not be made, or cannot be restored."""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Have FOLDER.partial (0700) to write into; it becomes `folder` when the block ends well, and goes otherwise.

    Conflict when there is something at `folder` already, or another backup is writing to it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is not empty: a backup needs a folder of its own.")
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        partial.mkdir(mode=0o700)
    except FileExistsError:
        raise Conflict(
            f"{partial} is there: another backup is at work, or was cut off. Remove it then."
        ) from None
    try:
        yield partial
        _sync(partial)
        partial.rename(folder)  # an empty folder gives way
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path, kind: str, **values: object) -> dict[str, Any]:
    """Write what the backup is, and return it: `kind`, `format`, `made_at` (RFC 3339), and `values`."""
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **values,
    }
    write_private(folder / _MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def read_manifest(folder: Path, kind: str | None = None) -> dict[str, Any]:
    """Read what a backup is. NotFound when it is none, IntegrityError when it is of another kind or format."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        known = manifest["format"] == FORMAT
        found = manifest["kind"]
    except FileNotFoundError:
        raise NotFound(f"{folder} is no backup of this service: it has no {_MANIFEST}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{folder / _MANIFEST} is damaged.") from error
    if not known:
        raise IntegrityError(
            f"{folder} was made by another version: format {manifest['format']}, not {FORMAT}."
        )
    if kind not in {None, found}:
        raise IntegrityError(f"{folder} is a backup of the {found}, not of the {kind}.")
    return dict(manifest)


def verify_file(path: Path, expected: str) -> None:
    """IntegrityError unless the file's SHA-256 is the one its manifest names."""
    if digest(path) != expected:
        raise IntegrityError(f"{path} is not what was backed up: its SHA-256 has changed.")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def tree_bytes(folder: Path) -> int:
    """How much a folder holds; files that vanish meanwhile count for nothing."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(path) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def require_space(where: Path, wanted: int) -> None:
    """BackupFailed unless the file system of `where` (or its nearest parent that exists) has room, and 64 MiB to spare."""
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < wanted + _SPARE_BYTES:
        raise BackupFailed(
            f"{where} has {free / 1e6:.0f} MB free, and {(wanted + _SPARE_BYTES) / 1e6:.0f} MB are needed."
        )


def expiry(manifest: Mapping[str, Any]) -> datetime:
    """When a key backup must be gone; IntegrityError when its manifest does not say."""
    try:
        return datetime.fromisoformat(manifest["expires_at"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError("The key backup's manifest has no expires_at.") from error


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

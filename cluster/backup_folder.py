"""What every backup is: a folder made whole or not at all, which says what is in it and who made it.

    FOLDER/manifest.json   what, when, by which version, and the SHA-256 of every file
    FOLDER/manifest.sig    the Ed25519 signature (RFC 8032) over manifest.json, in base64

The node's own key signs, the one that signs the audit log's checkpoints: `keys/audit-signing.key`, which is in no backup
of the database or of the key store. Whoever can write where the backups lie can take one away or put an older one in
its place, and no other.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import file_digest
from importlib.metadata import version
import json
import os
from pathlib import Path
import shutil
import stat
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from serve_app.audit.checkpoints import signing_key
from serve_app.domain.errors import Conflict, DermError, IntegrityError, NotFound
from serve_app.private_files import sync_folder, write_private

#: What a manifest of this version of the service looks like. The one before had no signature and named fewer files.
FORMAT = 2
UNSIGNED_FORMAT = 1

_MANIFEST, _SIGNATURE = "manifest.json", "manifest.sig"
#: What is signed begins with it: no signature over a checkpoint is one over a backup.
_PURPOSE = b"derm-cds backup\n"
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
        sync_folder(partial)
        partial.rename(folder)  # an empty folder gives way
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_manifest(folder: Path, kind: str, key: Path, **values: object) -> dict[str, Any]:
    """Write and sign what the backup is, and return it: `kind`, `format`, `made_at` (RFC 3339), `files`, and `values`.

    `key` is the file of the key that signs; it is made if need be.
    """
    manifest = {
        "kind": kind,
        "format": FORMAT,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "service_version": version("pms-derm-cds"),
        **values,
        "files": digests(folder),
    }
    content = json.dumps(manifest, indent=1).encode() + b"\n"
    write_private(folder / _MANIFEST, content)
    write_private(folder / _SIGNATURE, b64encode(signing_key(key).sign(_PURPOSE + content)) + b"\n")
    return manifest


def read_manifest(folder: Path, kind: str | None, trusted: Ed25519PublicKey | None) -> dict[str, Any]:
    """Read what a backup is; `trusted` must have signed it (None: whoever made it).

    NotFound when it is none, IntegrityError when it is of another `kind` (None: any) or format, or not signed so.
    """
    try:
        content = (folder / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        written, found = manifest["format"], manifest["kind"]
    except (FileNotFoundError, NotADirectoryError):
        lacks = f"it has no {_MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise NotFound(f"{folder} is no backup of this service: {lacks}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"{folder / _MANIFEST} is damaged.") from error
    if written not in {FORMAT, UNSIGNED_FORMAT}:
        raise IntegrityError(f"{folder} was made by another version: format {written}, not {FORMAT}.")
    if trusted is not None:
        if written == UNSIGNED_FORMAT:
            raise IntegrityError(
                f"{folder} is not signed: it says that it was made before backups were. Whoever can write there may have "
                "changed it: if you are sure of it, --accept-unsigned."
            )
        _verify_signature(folder, content, trusted)
    if kind not in {found, None}:
        raise IntegrityError(f"{folder} is a backup of the {found}, not of the {kind}.")
    if sums := manifest.get("sha256"):  # of an unsigned one: the key store's, or by its file
        manifest["files"] = sums if isinstance(sums, dict) else {"keystore.sqlite": sums}
    return dict(manifest)


def _verify_signature(folder: Path, content: bytes, trusted: Ed25519PublicKey) -> None:
    try:
        trusted.verify(b64decode((folder / _SIGNATURE).read_bytes()), _PURPOSE + content)
    except (OSError, ValueError, InvalidSignature) as error:
        raise IntegrityError(
            f"{folder} is not signed by the key it was held against: it was changed, or another node made it. That "
            "one's key is what `derm-cds audit public-key` printed there: --public-key FILE."
        ) from error


def refuse_others(folder: Path, manifest: dict[str, Any]) -> None:
    """IntegrityError where something lies at the top of a backup, an empty folder too, that its kind has not there."""
    known = {"data"} if manifest["kind"] == "database" else set(manifest.get("files", ()))
    for path in sorted(folder.iterdir()):
        if path.name not in {*known, _MANIFEST, _SIGNATURE}:
            raise IntegrityError(f"{path.name} is in the backup and not in its manifest.")


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """IntegrityError unless the folder holds the manifest's files and no other, each as it was backed up."""
    listed, found = manifest["files"], digests(folder)
    for name in sorted(listed.keys() | found.keys()):
        if name not in listed:
            raise IntegrityError(f"{name} is in the backup and not in its manifest.")
        if name not in found:
            raise IntegrityError(f"{name} is gone from the backup.")
        if listed[name] != found[name]:
            raise IntegrityError(f"{name} is not what was backed up: its SHA-256 has changed.")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a backup, by its path in it; the manifest and its signature are none of them."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in regular_files(folder)
        if path.parent != folder or path.name not in {_MANIFEST, _SIGNATURE}
    }


def regular_files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; IntegrityError for a link or anything else that is neither file nor folder."""
    for path in (folder, *sorted(folder.rglob("*"))):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path
        elif not stat.S_ISDIR(mode):
            what = "a link" if stat.S_ISLNK(mode) else "no file"
            raise IntegrityError(f"{path} is {what}: it was not made by this service.")


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

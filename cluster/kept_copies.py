"""What a restore kept of the home, and what one that was killed left: as good as backups, and as dangerous.

An image that is erased afterwards has its wrapped key in such a key store, its ciphertext and its
vector in such a data directory. So they expire as key backups do; `derm-cds backup --prune` deletes
them then, and `derm-cds status` names them for as long as they are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
import os
from pathlib import Path
import re
import shutil

from serve_app.private_files import locked_folder
from serve_app.settings import NodeFiles

#: How long a key store's backup, and whatever is as good as one, may be kept unless somebody says otherwise.
LIFETIME = timedelta(days=30)
#: No backup or restore is at work for so long: what it has not finished by then was cut off.
CUT_OFF_AFTER = timedelta(days=1)

_BEFORE = re.compile(r"\.before-(\d{8}T\d{6})(\d{6})?$")
_LOG_SUFFIXES = ("-wal", "-shm", "-journal")


@dataclass(frozen=True, slots=True)
class KeptCopy:
    """A key store or a data directory beside the one in use: since when, and when it must be gone."""

    path: Path
    since: datetime
    expires_at: datetime


def find_kept_copies(home: Path, *, lifetime: timedelta = LIFETIME) -> list[KeptCopy]:
    """Find what restores have kept in this home, oldest first."""
    store = NodeFiles(home).keystore
    kept = [
        *((path, lifetime) for path in store.parent.glob(f"{store.name}.before-*")),
        *((path, CUT_OFF_AFTER) for path in store.parent.glob(f"{store.name}.restored*")),
        *((path, lifetime) for path in (home / "postgres").glob("data.before-*")),
    ]
    # What SQLite has beside a store goes with it; alone, it is a copy as well.
    names = {path.name for path, _ in kept}
    copies = []
    for path, until in kept:
        whole = next((path.name.removesuffix(s) for s in _LOG_SUFFIXES if path.name.endswith(s)), None)
        if whole not in names:
            since = _since(path)
            copies.append(KeptCopy(path, since, since + until))
    return sorted(copies, key=lambda copy: copy.since)


def prune_kept_copies(home: Path, *, lifetime: timedelta = LIFETIME) -> list[Path]:
    """Delete what has expired of it, key stores overwritten first; returns which."""
    gone = []
    for copy in find_kept_copies(home, lifetime=lifetime):
        if copy.expires_at > datetime.now(UTC):
            continue
        if copy.path.is_dir():
            shutil.rmtree(copy.path)
        else:
            with locked_folder(copy.path.parent):
                for suffix in ("", *_LOG_SUFFIXES):
                    path = copy.path.with_name(f"{copy.path.name}{suffix}")
                    overwrite(path)
                    path.unlink(missing_ok=True)
        gone.append(copy.path)
    return gone


def last_touched(folder: Path) -> datetime:
    """When something in a folder was last written."""
    times = [path.stat().st_mtime for path in (folder, *folder.rglob("*"))]
    return datetime.fromtimestamp(max(times), UTC)


def overwrite(path: Path) -> None:
    """Overwrite with zeros what is deleted: all that can be done where the file system writes in place."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        file.flush()
        os.fsync(file.fileno())


def _since(path: Path) -> datetime:
    """When it was set aside, which its name says; its file's time would be that of its last change, long before."""
    named = _BEFORE.search(path.name)
    if named is not None:
        return datetime.strptime(named[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)

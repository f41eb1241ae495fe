"""Files and folders that only the service's own user can read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import fcntl
import os
from pathlib import Path
import stat

from serve_app.domain.errors import IntegrityError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Hold a private folder alone, against other threads and processes; make it (0700) if need be.

    What was made in it survives a crash once the block has ended. IntegrityError when
    another user may look in.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _refuse_shared(os.fstat(descriptor), path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)  # and with it the lock


def read_private(path: Path) -> bytes:
    """Read a whole file; IntegrityError when another user may read or write it."""
    with path.open("rb") as file:
        _refuse_shared(os.fstat(file.fileno()), path)
        return file.read()


def write_private(path: Path, content: bytes) -> None:
    """Put a whole file (0600) in place in one step: a crash leaves the old one or the new one.

    Call it inside `locked_folder`, which makes the step durable.
    """
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # a crashed writer's, never in use
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def touch_private(path: Path) -> None:
    """Make an empty file (0600) if there is none; IntegrityError when another user may use it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
        _refuse_shared(os.fstat(file.fileno()), path)


def _refuse_shared(status: os.stat_result, path: Path) -> None:
    if status.st_mode & _OTHERS:
        raise IntegrityError(f"{path} is open to other users: chmod go-rwx it")
    if status.st_uid not in {0, os.geteuid()}:
        raise IntegrityError(f"{path} belongs to another user: run as that user, or chown it")

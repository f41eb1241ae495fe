"""What only the service's own user may read: files, folders, its processes' memory; and what others may not write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
import ctypes
import fcntl
import os
from pathlib import Path
import resource
import stat
from typing import BinaryIO

from serve_app.domain.errors import IntegrityError

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_SET_DUMPABLE = 4  # PR_SET_DUMPABLE, prctl(2)


def forbid_core_dumps() -> None:
    """Have no crash of this process, or of one that it starts from now on, leave its memory behind: images, keys, tokens.

    One byte, and not none: a core_pattern that is a program (systemd-coredump, apport) gets the memory whatever the
    limit is, but for this one (fs/coredump.c of the kernel); and a file of one byte is none.
    """
    _, ceiling = resource.getrlimit(resource.RLIMIT_CORE)
    limit = min(1, ceiling) if ceiling != resource.RLIM_INFINITY else 1
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def hide_memory() -> None:
    """Let no other process of this user, a debugger say, look into this one; what it starts is not hidden.

    Not for what serves: of a hidden process an ordinary user cannot see the ports either, which `derm-cds status` does.
    """
    ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)


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
    remove_secret(partial)  # a crashed writer's, never in use
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def replace_secret(path: Path, content: bytes) -> None:
    """As `write_private`, and overwrite what was in the file before: all that can be done about a secret on a disk.

    It helps where the file system writes in place: flash drives, copy-on-write and snapshots keep what was there. A
    hard link to the file is somebody's copy, perhaps the only one, and left alone. Whoever read the file while it was
    replaced may have read zeros, and looks whether it is still the same.
    """
    with suppress(OSError):
        path.chmod(0o600)  # so that one which nobody may write can be overwritten, too
    try:
        before = path.open("r+b")
    except FileNotFoundError:
        write_private(path, content)
        return
    with before:
        changes = before.read() != content
        write_private(path, content)
        if changes and not os.fstat(before.fileno()).st_nlink:
            sync_folder(
                path.parent
            )  # the new one is in place after a power cut, too, before the old one is gone
            _overwrite(before)


def remove_secret(path: Path) -> None:
    """Overwrite a file and remove it, where there is one; what that does not promise is in `replace_secret`.

    OSError for a link: what it leads to is not what was to be removed.
    """
    with suppress(FileNotFoundError), os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW), "r+b") as file:
        _overwrite(file)
        path.unlink()


def _overwrite(file: BinaryIO) -> None:
    file.seek(0)
    file.write(bytes(os.fstat(file.fileno()).st_size))
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def distrust(path: Path, *, secret: bool = False) -> str | None:
    """Say how another user could change what this file says, or read a secret; None when no other than root could.

    File and folders are root's or this user's. Neither the group nor others may write to the file or to its folder,
    and others to no folder above, unless it is sticky as /tmp is. None, too, where nothing is.
    """
    try:
        real, named = path.resolve(strict=True), path.absolute()
        places = [(named, named.lstat())]
        places += [(place, place.stat()) for place in (real, *real.parents, *named.parents)]
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path} cannot be looked at ({type(error).__name__})"
    near = {real, real.parent, named.parent}
    if secret and real.stat().st_mode & stat.S_IROTH:
        return f"{real} may be read by other users: chmod o-r it"
    for place, status in places:
        if status.st_uid not in {0, os.geteuid()}:
            return f"{place} belongs to another user: chown it to root, or to the user that serves"
        writable = status.st_mode & (_WRITABLE if place in near else stat.S_IWOTH)
        if writable and not status.st_mode & stat.S_ISVTX and not stat.S_ISLNK(status.st_mode):
            return f"{place} may be written by other users: chmod go-w it"
    return None


def touch_private(path: Path) -> None:
    """Make an empty file (0600) if there is none; IntegrityError when another user may use it."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "rb") as file:
        _refuse_shared(os.fstat(file.fileno()), path)


def _refuse_shared(status: os.stat_result, path: Path) -> None:
    if status.st_mode & _OTHERS:
        raise IntegrityError(f"{path} is open to other users: chmod go-rwx it")
    if status.st_uid not in {0, os.geteuid()}:
        raise IntegrityError(f"{path} belongs to another user: run as that user, or chown it")

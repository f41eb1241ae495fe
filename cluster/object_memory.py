"""Where Ray keeps the objects of a node, originals of images among them: in memory, not on a disk.

Ray's store is a file in shared memory. What does not fit it writes to its spill directory, and what cannot be
moved it maps from files there: images in clear. So store and spill directory are one folder of a file
system that is memory itself, as /dev/shm is wherever there is enough of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import os
from pathlib import Path
import shutil

import psutil

SHARED = Path("/dev/shm")  # noqa: S108  in a folder of our own there, 0700
#: File systems whose files are pages of memory and nothing else.
_MEMORY = frozenset({"tmpfs", "ramfs"})
#: Options of the raylet that say where it puts objects.
_OPTIONS = ("--plasma_directory=", "--fallback_directory=")
#: The store, and as much again for what does not fit in it.
_TIMES = 2


def is_memory(path: Path, mounts: Mapping[str, str] | None = None) -> bool:
    """Whether files below `path` are in memory (which the system may swap, but no file system writes).

    `mounts` is mount point: file system type; that of this machine unless given.
    """
    if mounts is None:
        mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    real = Path(os.path.realpath(path))
    nearest = next((str(place) for place in (real, *real.parents) if str(place) in mounts), None)
    return nearest is not None and mounts[nearest] in _MEMORY


def has_room(memory: Path, store_bytes: int) -> bool:
    """Whether `memory` is memory, with room for a store of that size and for what does not fit in it."""
    return (
        memory.is_dir()
        and os.access(memory, os.W_OK)
        and is_memory(memory)
        and shutil.disk_usage(memory).free >= _TIMES * store_bytes
    )


def advice(memory: Path, store_bytes: int) -> str:
    """What to do where there is no such room."""
    megabytes = _TIMES * store_bytes // 1_000_000
    return (
        f"images would lie in clear on a disk: {memory} is not memory with {megabytes} MB free. "
        f"Enlarge it (mount -o remount,size=1g {memory}; a container: --shm-size=1g)"
    )


def on_disk(raylet: Iterable[str]) -> list[Path]:
    """The folders where a running raylet (its command line) puts objects, and that are on a disk."""
    named = {
        Path(argument.removeprefix(option))
        for argument in raylet
        for option in _OPTIONS
        if argument.startswith(option)
    }
    return sorted(path for path in named if not is_memory(path))


def empty(folder: Path) -> None:
    """Remove what is in a folder: objects that a node which was killed left behind."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

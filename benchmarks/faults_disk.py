"""A small disk of its own, and a ballast that fills it to the last byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import os
from pathlib import Path
import shutil
import subprocess
import tempfile

#: An initialised server, its model's references and some write-ahead log take 250 MB.
SIZE = "700m"


class NoSmallDisk(RuntimeError):
    """A tmpfs cannot be mounted here: that needs root, and a container with CAP_SYS_ADMIN."""


@contextmanager
def small_disk(size: str = SIZE) -> Iterator[Path]:
    """Mount a tmpfs of so many bytes, and unmount it. Raises NoSmallDisk."""
    folder = Path(tempfile.mkdtemp(prefix="derm-disk-"))
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    try:
        if mount is None or unmount is None or os.geteuid() != 0:
            raise NoSmallDisk(NoSmallDisk.__doc__)
        done = subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={size},mode=0711", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise NoSmallDisk(f"{NoSmallDisk.__doc__} mount said: {done.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([unmount, "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def fill(disk: Path) -> Path:
    """Write until the disk takes no byte more; returns the ballast, which `unlink` takes off again."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as output:
        for block in (1024 * 1024, 4096, 1):
            try:
                while output.write(b"\0" * block):
                    pass
            except OSError:
                continue
    return ballast

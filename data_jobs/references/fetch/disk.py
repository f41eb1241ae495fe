"""Whether the images will fit, asked before the first is fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
import shutil

from data_jobs.references.catalogue import CatalogueEntry
from data_jobs.references.fetch.errors import FetchError

#: Where no size is known at all: a dermoscopic JPEG of the archive, bytes.
TYPICAL = 2_000_000
#: Left free beside the images: file-system blocks, the catalogue, and the rest of the machine, bytes.
RESERVE = 512 * 1024 * 1024
_GB = 1e9


def needed_bytes(entries: Iterable[CatalogueEntry]) -> int:
    """Bytes of the entries' images; one whose size is not known counts as the mean of the others."""
    sizes = [entry.bytes for entry in entries]
    known = [size for size in sizes if size is not None]
    typical = sum(known) // len(known) if known else TYPICAL
    return sum(known) + typical * (len(sizes) - len(known))


def check_space(folder: Path, entries: Iterable[CatalogueEntry]) -> int:
    """Bytes that the images need. Raises FetchError when the folder's disk has no room for them and the reserve."""
    needed = needed_bytes(entries)
    free = shutil.disk_usage(folder).free
    if needed + RESERVE > free:
        raise FetchError(
            f"The images need {needed / _GB:.1f} GB and {RESERVE / _GB:.1f} GB are to stay free, "
            f"but {folder} has {free / _GB:.1f} GB. Make room, name another --output, or a smaller --count."
        )
    return needed

"""Looking for many byte strings in many files at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import os
from pathlib import Path
import stat

import numpy as np

_CHUNK = 16 * 1024 * 1024
_PREFIX = 2


class Needles:
    """Byte strings, each with the name under which a find is told."""

    def __init__(self, names: Mapping[bytes, str]) -> None:
        self._longest = max(map(len, names))
        self._by_beginning: dict[bytes, list[tuple[bytes, str]]] = {}
        # One search a needle is too slow: the first two bytes tell nearly all places apart, and their table
        # fits a processor's cache.
        self._begins = np.zeros(1 << 8 * _PREFIX, dtype=bool)
        for needle, name in names.items():
            assert len(needle) >= _PREFIX
            self._by_beginning.setdefault(needle[:_PREFIX], []).append((needle, name))
            self._begins[int.from_bytes(needle[:_PREFIX], "little")] = True

    def of(self, content: bytes) -> set[str]:
        """Name those that stand in `content`."""
        return {
            name
            for odd in range(_PREFIX)
            for place in self._candidates(content, odd)
            for needle, name in self._by_beginning[content[place : place + _PREFIX]]
            if content.startswith(needle, place)
        }

    def _candidates(self, content: bytes, odd: int) -> list[int]:
        pairs = max(0, len(content) - odd) // _PREFIX
        data = np.frombuffer(content, "<u2", count=pairs, offset=odd if pairs else 0)
        places: list[int] = (np.flatnonzero(self._begins[data]) * _PREFIX + odd).tolist()
        return places

    def inside(self, path: Path) -> set[str]:
        """Name those that stand in a file; none when it goes while it is being read."""
        found: set[str] = set()
        try:
            with path.open("rb") as file:
                kept = b""
                while chunk := file.read(_CHUNK):
                    content = kept + chunk
                    found |= self.of(content)
                    kept = content[-self._longest :]
        except FileNotFoundError:
            pass
        return found

    def among(self, paths: Iterable[Path]) -> dict[str, set[str]]:
        """Path: what was found in it, for all that hold anything."""
        return {str(path): found for path in paths if (found := self.inside(path))}


def parts(image: bytes, name: str) -> dict[bytes, str]:
    """Needles from an image's beginning (past what every image of its kind begins with), middle and end.

    The middle also in the hexadecimal form that PostgreSQL and Python print.
    """
    middle = image[len(image) // 2 :][:64]
    return {
        image[1024:1088]: f"{name}, beginning",
        image[len(image) // 4 :][:64]: f"{name}, first quarter",
        middle: f"{name}, middle",
        middle[:24].hex().encode(): f"{name}, in hexadecimal",
        image[-80:-16]: f"{name}, end",
    }


def files(root: Path, *, since: float = 0.0, without: Path | None = None) -> Iterator[Path]:
    """Every regular file below `root` that was changed at `since` (epoch, s) or later and may be read by us."""
    for folder, names, found in os.walk(root):
        names[:] = [name for name in names if Path(folder, name) != without]
        for name in found:
            path = Path(folder, name)
            try:
                status = path.lstat()
            except FileNotFoundError:
                continue
            if stat.S_ISREG(status.st_mode) and status.st_ctime >= since and os.access(path, os.R_OK):
                yield path

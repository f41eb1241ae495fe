"""What a source of reference images must offer: its images page by page, and the bytes of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a source's images: the archive's fields, flat, with `public` and `bytes` where known.

    `cursor`: where the next page begins, None where a listing can not be resumed there.
    `total`: images in all pages, where the source says.
    """

    records: Sequence[Mapping[str, object]]
    cursor: str | None = None
    total: int | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """An image as it arrives; `length` in bytes, None where the source does not state it."""

    chunks: Iterator[bytes]
    length: int | None


class Source(Protocol):
    """The archive, its bucket, or a folder."""

    name: str
    #: How often an image is tried before it counts as failed.
    attempts: int

    def parameters(self) -> dict[str, str]:
        """What its listing depends on, to compare one fetch with an earlier one into the same folder."""

    def pages(self, cursor: str | None) -> Iterator[Page]:
        """List its images, from a page's cursor or from the start. Raises FetchError."""

    def open(self, isic_id: str) -> AbstractContextManager[Body]:
        """Open an image. Raises Transient or Refused, also while the chunks are read."""

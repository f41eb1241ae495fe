"""Named queries of one file of SQL: PostgreSQL's of the records, SQLite's of the key store."""

from __future__ import annotations

from collections.abc import Mapping
import re
from types import MappingProxyType

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


def parse(text: str) -> Mapping[str, str]:
    """Split a text into its named queries; ValueError for one without a description, or named twice."""
    _, *parts = _NAME.split(text)
    found: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in found:
            raise ValueError(f"Two queries are named {name}")
        if not body.startswith("-- "):
            raise ValueError(f"The query {name} does not say what it does")
        found[name] = body.strip().rstrip(";")
    return MappingProxyType(found)

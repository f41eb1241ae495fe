"""Named queries of one file of SQL: PostgreSQL's of the records, SQLite's of the key store."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
import re
from types import MappingProxyType
from typing import Any

_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
#: A parameter, and not PostgreSQL's cast (`::text`).
_PARAMETER = re.compile(r"(?<!:):([a-z]\w*)")


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


def bind(query: str, values: Mapping[str, object]) -> tuple[Any, ...]:
    """Give a query with named parameters (`:name`) PostgreSQL's numbered ones; returns it and its arguments."""
    text, names = numbered(query)
    return (text, *(values[name] for name in names))


@cache
def numbered(query: str) -> tuple[str, tuple[str, ...]]:
    """Number a query's named parameters; returns their names in that order, too."""
    names = list(dict.fromkeys(_PARAMETER.findall(query)))
    return _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", query), tuple(names)

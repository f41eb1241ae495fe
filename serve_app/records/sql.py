"""The named queries of queries/*.sql, read once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
import re
from types import MappingProxyType

_QUERIES = Path(__file__).parent / "queries"
_NAME = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)


@cache
def queries(file: str) -> Mapping[str, str]:
    """Read `queries/<file>.sql`: each query stands below its `-- name:` and a line that says what it does."""
    return parse((_QUERIES / f"{file}.sql").read_text())


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

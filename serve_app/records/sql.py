"""The named queries of queries/*.sql, read once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from serve_app.sql import parse

_QUERIES = Path(__file__).parent / "queries"


@cache
def queries(file: str) -> Mapping[str, str]:
    """Read `queries/<file>.sql`: each query stands below its `-- name:` and a line that says what it does."""
    return parse((_QUERIES / f"{file}.sql").read_text())

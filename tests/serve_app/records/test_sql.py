"""Named queries: each has a name of its own and says what it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.records import pool as sql
from serve_app.sql import bind, numbered, parse


def test_queries_are_split_by_name() -> None:
    text = "-- name: one\n-- The first.\nSELECT 1;\n\n-- name: two\n-- The second.\nSELECT 2\n;\n"
    assert parse(text) == {"one": "-- The first.\nSELECT 1", "two": "-- The second.\nSELECT 2\n"}


def test_a_named_parameter_has_one_number_and_a_cast_is_none() -> None:
    query = "SELECT :b::text, :a, :b || 'x', '{\"c\": 1}'::jsonb"
    bound = "SELECT $1::text, $2, $1 || 'x', '{\"c\": 1}'::jsonb"
    assert bind(query, {"a": 1, "b": 2, "unused": 3}) == (bound, 2, 1)


@pytest.mark.parametrize("text", ["-- name: a\nSELECT 1;", "-- name: a\n-- x\n\n-- name: a\n-- y\n"])
def test_queries_without_description_or_with_a_taken_name_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quer"):
        parse(text)


async def test_every_query_is_valid_on_the_real_schema(owner_pool) -> None:
    for path in sorted((Path(sql.__file__).parent / "queries").glob("*.sql")):
        for name, query in sql.queries(path.stem).items():
            if name.startswith(
                ("take_in", "forgive", "leave_only_arrivals", "grant", "make_ledger", "recount", "follow_ups")
            ):  # of a temporary table, or of the including statement's; several statements
                continue
            async with owner_pool.connection() as connection:
                await connection.prepare(numbered(query)[0])

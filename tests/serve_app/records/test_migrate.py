"""A pending migration runs once, whoever starts and however many at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from serve_app.records.migrate import BASELINE, MIGRATIONS, SchemaMismatch, migrate, pending, read_migrations


@pytest.fixture
async def empty(new_database):
    return await new_database(migrated=False)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for path in MIGRATIONS.glob("*.sql"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


async def _fetch(url: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def test_many_starters_apply_each_migration_once_and_every_table_says_what_it_is(empty) -> None:
    starts = [migrate(empty.owner, application_role="derm_app") for _ in range(4)]
    applied = await asyncio.gather(*starts)
    names = [migration.name for migration in read_migrations(MIGRATIONS)]
    assert sorted(filter(None, applied)) == [names]
    rows = await _fetch(empty.owner, "SELECT name FROM schema_migrations ORDER BY version")
    assert [row["name"] for row in rows] == names
    undescribed = await _fetch(
        empty.owner,
        "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        " AND obj_description(oid) IS NULL",
    )
    assert undescribed == []


async def test_a_failing_upgrade_of_a_live_schema_leaves_nothing_and_the_mended_one_runs_once(
    empty, copied: Path
) -> None:
    await migrate(empty.owner, application_role="derm_app", directory=copied)
    upgrade = copied / "0900_upgrade.sql"
    upgrade.write_text("CREATE TABLE half (n int); SELECT 1 / 0;")
    with pytest.raises(SchemaMismatch, match=r"0900_upgrade.*division by zero"):
        await migrate(empty.owner, application_role="derm_app", directory=copied)
    assert await _fetch(empty.owner, "SELECT to_regclass('half') AS half") == [(None,)]
    upgrade.write_text("CREATE TABLE half (n int); INSERT INTO half VALUES (1); SELECT pg_sleep(0.2);")
    assert await pending(empty.owner, directory=copied) == ["0900_upgrade"]
    starts = [migrate(empty.owner, application_role="derm_app", directory=copied) for _ in range(4)]
    assert sorted(await asyncio.gather(*starts), key=len) == [[], [], [], ["0900_upgrade"]]
    assert len(await _fetch(empty.owner, "SELECT n FROM half")) == 1
    assert await pending(empty.owner, directory=copied) == []


async def test_changed_missing_and_passed_over_files_are_refused(empty, copied: Path) -> None:
    await migrate(empty.owner, application_role="derm_app", directory=copied)
    extra = copied / "0000_late.sql"
    extra.write_text("SELECT 1;")
    with pytest.raises(SchemaMismatch, match="passed over"):
        await migrate(empty.owner, application_role="derm_app", directory=copied)
    extra.unlink()
    last = copied / f"{read_migrations(copied)[-1].name}.sql"
    text = last.read_text()
    last.write_text(text + "-- a word more\n")
    with pytest.raises(SchemaMismatch, match="has changed"):
        await migrate(empty.owner, application_role="derm_app", directory=copied)
    last.unlink()
    with pytest.raises(SchemaMismatch, match="does not know"):
        await pending(empty.owner, directory=copied)


STEPS = "INSERT INTO schema_migrations SELECT n, format('%s_step', n), 'x' FROM generate_series(1, {}) AS n"


@pytest.mark.parametrize("through", [BASELINE, 18])
async def test_a_database_made_step_by_step_counts_as_having_the_baseline(
    empty, copied: Path, through: int
) -> None:
    """And goes on from there; what came later is compared as ever."""
    later = [migration.name for migration in read_migrations(copied) if migration.version > through]
    for name in later:
        (copied / f"{name}.sql").unlink()
    await migrate(empty.owner, application_role=None, directory=copied)
    await _fetch(empty.owner, "DELETE FROM schema_migrations WHERE version < 15")
    await _fetch(empty.owner, STEPS.format(BASELINE))
    assert await migrate(empty.owner, application_role="derm_app") == later
    assert await pending(empty.owner) == []
    await _fetch(empty.owner, "UPDATE schema_migrations SET sha256 = 'x' WHERE version = 15")
    with pytest.raises(SchemaMismatch, match="0015_failures has changed"):
        await pending(empty.owner)


async def test_a_database_that_stopped_below_the_baseline_is_told_what_to_do(empty) -> None:
    await migrate(empty.owner, application_role=None)
    await _fetch(empty.owner, "DELETE FROM schema_migrations")
    await _fetch(empty.owner, STEPS.format(BASELINE - 1))
    with pytest.raises(SchemaMismatch, match=r"at 13_step.*start it once with an earlier build"):
        await migrate(empty.owner, application_role="derm_app")


@pytest.mark.parametrize("name", ["1_short.sql", "0014_again.sql", "0009-dash.sql"])
def test_misnamed_files_are_refused(copied: Path, name: str) -> None:
    (copied / name).write_text("SELECT 1;")
    with pytest.raises(SchemaMismatch):
        read_migrations(copied)


async def test_the_application_role_must_exist(empty) -> None:
    with pytest.raises(SchemaMismatch, match="no role"):
        await migrate(empty.owner, application_role="nobody_here")


@pytest.mark.parametrize("role", [None, "derm_owner"])
async def test_one_role_can_migrate_and_serve(empty, role: str | None) -> None:
    await migrate(empty.owner, application_role=role)
    may = (
        "SELECT bool_and(has_table_privilege(c.oid, 'UPDATE')) AS may FROM pg_class AS c WHERE relkind = 'r'"
    )
    assert await _fetch(empty.owner, f"{may} AND relnamespace = 'public'::regnamespace") == [(True,)]

"""A database that is not to be trusted with patients' records, made so on a real server, and found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
import json
import re

import asyncpg
import pytest

from cluster.postgres import DatabaseUrls
from cluster.prepare import prepare
from cluster.safety import (
    Finding,
    access_findings,
    database_findings,
    look_at,
    remote_hosts,
    transport_findings,
)
from serve_app.domain.errors import DermError
from serve_app.records.pool import open_pool
from serve_app.settings import Settings

GOOD_SECRET = "kT4vQe9ZxW2mRb7YpL0sDf8HgJ3nUc6A"
REMOTE = "postgresql://derm:secret@db.clinic.example/derm"


def names(found: list[Finding]) -> list[str]:
    return [finding.name for finding in found]


async def test_parameters_that_lose_records_are_found(postgres, as_superuser) -> None:
    """The server of these tests writes nothing through, to begin with."""
    urls = postgres.ensure()
    pool = await open_pool(urls.app, minimum=0, maximum=1)
    connection = await asyncpg.connect(as_superuser(urls))
    wanted = {"fsync": "off", "full_page_writes": "off", "password_encryption": "md5"}
    try:
        await connection.execute("ALTER SYSTEM SET full_page_writes = off")
        await connection.execute("ALTER SYSTEM SET password_encryption = md5")
        async with asyncio.timeout(60):
            while len(found := await database_findings(pool)) < len(wanted):
                await connection.execute("SELECT pg_reload_conf()")
                await asyncio.sleep(0.1)
        assert {finding.name: finding.advice.partition(": ")[0] for finding in found} == {
            name: f"{name} is {value}" for name, value in wanted.items()
        }
    finally:
        await connection.execute("ALTER SYSTEM RESET ALL")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        await pool.close()


async def test_our_own_pg_hba_is_safe_and_a_trust_line_is_found(postgres, as_superuser) -> None:
    dsn = as_superuser(postgres.ensure())
    assert await access_findings(dsn) == []
    hba = postgres.directory / "etc" / "pg_hba.conf"
    before = hba.read_text()
    try:
        hba.write_text(f"{before}host all all 127.0.0.2/32 trust\n")
        (found,) = await access_findings(dsn)
        assert "says trust" in found.advice
    finally:
        hba.write_text(before)


@pytest.fixture
async def superuser(database: DatabaseUrls, as_superuser) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(as_superuser(database))
    yield connection
    await connection.close()


@pytest.fixture
async def clerk(database: DatabaseUrls, superuser) -> AsyncIterator[DatabaseUrls]:
    """The database, served by a role `clerk` that an operator made and gave what serving needs."""
    await superuser.execute("CREATE ROLE clerk LOGIN PASSWORD 'clerk'; GRANT derm_app TO clerk")
    name = re.search(r"/(derm_\d+)\?", database.app)[1]
    await superuser.execute(f"GRANT CONNECT ON DATABASE {name} TO clerk")
    yield DatabaseUrls(owner=database.owner, app=re.sub(r"//.*?@", "//clerk:clerk@", database.app))
    await superuser.execute("DROP OWNED BY clerk; DROP ROLE clerk")


async def _said_of_the_role(urls: DatabaseUrls) -> str:
    """The one finding about the role that serves; empty without one."""
    found = [finding.advice for finding in await look_at(urls) if finding.name == "database_role"]
    assert len(found) <= 1
    return "".join(found)


async def test_the_role_that_we_make_is_safe_and_neither_the_owner_nor_a_superuser(
    database: DatabaseUrls, as_superuser
) -> None:
    """The URL of one role for everything, as an operator would write it."""
    assert await _said_of_the_role(database) == ""
    said = await _said_of_the_role(DatabaseUrls(owner=database.owner, app=database.owner))
    assert said.startswith("derm_owner, the role that serves, owns audit_events")
    assert "DERM_OWNER_DATABASE_URL" in said
    said = await _said_of_the_role(DatabaseUrls(owner=database.owner, app=as_superuser(database)))
    assert "is a superuser" in said


@pytest.mark.parametrize(
    ("grant", "said"),
    [
        ("UPDATE ON audit_events", "may change audit_events"),
        ("UPDATE (actor) ON audit_events", "may change audit_events"),
        ("DELETE ON audit_events", "may change audit_events"),
        ("TRUNCATE ON audit_events", "may change audit_events"),
        ("TRIGGER ON audit_events", "may change audit_events"),
        ("DELETE ON audit_seals", "may change audit_seals"),
        ("pg_write_all_data", "may change audit_events"),
        ("derm_owner", "owns audit_events"),
        ("ALTER SCHEMA public OWNER TO clerk", "owns audit_events"),  # and can drop its tables
    ],
)
async def test_a_right_over_the_audit_log_is_found(clerk, superuser, grant: str, said: str) -> None:
    assert await _said_of_the_role(clerk) == ""
    await superuser.execute(grant if grant.startswith("ALTER") else f"GRANT {grant} TO clerk")
    try:
        assert said in await _said_of_the_role(clerk)
    finally:
        await superuser.execute("ALTER SCHEMA public OWNER TO derm_owner")


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("postgresql://a:b@db.example/derm", ["db.example"]),
        ("postgresql://a:b@10.0.0.5:5433/derm?sslmode=require", ["10.0.0.5"]),
        ("postgresql://a:b@[2001:db8::1]:5432/derm", ["2001:db8::1"]),
        ("postgresql://a:b@127.0.0.1:1,db.example:2/derm", ["db.example"]),
        ("postgresql:///derm?host=db.example&user=a", ["db.example"]),
        ("postgresql://a:b@localhost/derm", []),
        ("postgresql://a:b@127.0.0.1:5432/derm", []),
        ("postgresql://a:b@[::1]/derm", []),
        ("postgresql://a:b@/derm?host=/run/postgresql", []),
        ("postgresql://a:b@%2Frun%2Fpostgresql/derm", []),
        ("postgresql:///derm", []),
    ],
)
def test_another_machine_is_told_from_this_one(url: str, remote: list[str], monkeypatch) -> None:
    monkeypatch.delenv("PGHOST", raising=False)
    monkeypatch.delenv("PGSSLMODE", raising=False)
    assert remote_hosts(url) == remote
    assert names(transport_findings(DatabaseUrls(owner=url, app=url))) == ["database_tls"] * 2 * len(remote)


def test_only_a_proven_other_end_will_do_and_the_environment_may_name_both(monkeypatch) -> None:
    for mode in ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"):
        url = f"{REMOTE}?sslmode={mode}&sslrootcert=/etc/ca.pem"
        found = transport_findings(DatabaseUrls(owner=url, app=url))
        assert bool(found) is (mode != "verify-full")
        assert not any("secret" in finding.advice for finding in found)
    urls = DatabaseUrls(owner="postgresql:///derm", app="postgresql:///derm")
    monkeypatch.setenv("PGHOST", "db.example")
    assert names(transport_findings(urls)) == ["database_tls"] * 2
    monkeypatch.setenv("PGSSLMODE", "verify-full")
    assert transport_findings(urls) == []


def _production(home, urls: DatabaseUrls, monkeypatch) -> Settings:
    monkeypatch.setenv("DERM_DATABASE_URL", urls.app)
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)
    return Settings(home=home, env="production", database_url=urls.app, token_secret=GOOD_SECRET)


async def test_production_does_not_start_on_one_role_or_a_server_that_loses_records(
    database: DatabaseUrls, tmp_path, monkeypatch
) -> None:
    """The server of these tests writes nothing through."""
    urls = DatabaseUrls(owner=database.owner, app=database.owner)
    with pytest.raises(DermError, match=r"Refused in production.*fsync is off.*owns audit_events"):
        await prepare(_production(tmp_path, urls, monkeypatch), model=None)


async def test_production_sends_no_password_to_another_machine_in_clear(tmp_path, monkeypatch) -> None:
    urls = DatabaseUrls(owner=f"{REMOTE}?sslmode=verify-full", app=f"{REMOTE}?sslmode=require")
    with pytest.raises(DermError, match=r"DERM_DATABASE_URL leads to db\.clinic\.example") as refused:
        await prepare(_production(tmp_path, urls, monkeypatch), model=None)
    assert "secret" not in str(refused.value)


def test_status_tells_of_an_operators_own_database(
    derm_cds, urls: DatabaseUrls, tmp_path, monkeypatch
) -> None:
    """Another home's server, as an operator's own: the URL in service.env, and one role for everything."""
    file = tmp_path / "secrets" / "service.env"
    file.parent.mkdir(mode=0o700)
    file.touch(mode=0o600)
    file.write_text(f'DERM_DATABASE_URL="{urls.owner}"\nDERM_TOKEN_SECRET={GOOD_SECRET}\n')
    told = json.loads(derm_cds("status", "--json", home=tmp_path).out)
    assert told["database"] == "DERM_DATABASE_URL"
    assert told["schema"] == "up to date"
    assert "owns audit_events" in str(told["safety"]["database_role"])
    file.write_text(f"DERM_DATABASE_URL={urls.app}\nDERM_TOKEN_SECRET={GOOD_SECRET}\n")
    monkeypatch.setenv("DERM_OWNER_DATABASE_URL", urls.owner)
    told = json.loads(derm_cds("status", "--json", home=tmp_path).out)
    assert set(told["safety"]) == {"env", "keystore"}  # that home's images have their keys there

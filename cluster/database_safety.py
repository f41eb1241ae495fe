"""Whether a database is one to trust with patients' records: the embedded server, or an operator's own."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
import os
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import asyncpg

from cluster.finding import Finding
from cluster.postgres_state import DatabaseUrls
from serve_app.records.pool import Pool, open_pool
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

#: PostgreSQL's parameters that keep a committed assessment through a crash, and bad pages from going unseen.
_SETTINGS: Mapping[str, tuple[str, str]] = {
    "fsync": ("on", "set fsync = on (postgresql.conf, or postgres/etc/local.conf): a crash may lose records"),
    "full_page_writes": ("on", "set full_page_writes = on: a crash may tear pages"),
    "data_checksums": ("on", "run pg_checksums --enable on the stopped server: bad pages go unseen"),
    "password_encryption": ("scram-sha-256", "set password_encryption = 'scram-sha-256'"),
}
#: Values of synchronous_commit under which an answer is on this server's disk before the caller has it.
_DURABLE = frozenset({"on", "local", "remote_write", "remote_apply"})
_METHODS = frozenset({"scram-sha-256", "peer", "cert", "reject"})


async def database_findings(pool: Pool) -> list[Finding]:
    """What is unsafe in the database, as far as the role that serves may see; `pool` is that role's."""
    return [*await _parameter_findings(pool), *await _role_findings(pool)]


async def _parameter_findings(pool: Pool) -> list[Finding]:
    rows = await pool.fetch(_SQL["settings"], [*_SETTINGS, "synchronous_commit"])
    values = {row["name"]: row["setting"] for row in rows}
    found = [
        Finding(name, f"{name} is {values.get(name, 'unknown')}: {advice}")
        for name, (wanted, advice) in _SETTINGS.items()
        if values.get(name) != wanted
    ]
    if values.get("synchronous_commit") not in _DURABLE:
        advice = "set it to on: a crash loses answers that were given"
        found.append(
            Finding("synchronous_commit", f"synchronous_commit is {values['synchronous_commit']}: {advice}")
        )
    return found


async def _role_findings(pool: Pool) -> list[Finding]:
    for row in await pool.fetch(_SQL["role"]):
        table, role = row["table_name"], row["role"]
        if row["superuser"]:
            said = f"{role}, the role that serves, is a superuser"
        elif row["owns"]:
            said = f"{role}, the role that serves, owns {table} and can drop what makes it append-only"
        elif row["changes"]:
            said = f"{role}, the role that serves, may change {table}"
        else:
            continue
        advice = (
            "name a role of its own in DERM_DATABASE_URL, and the schema's owner in DERM_OWNER_DATABASE_URL"
        )
        return [Finding("database_role", f"{said}: {advice}, then derm-cds migrate")]
    return []


def transport_findings(urls: DatabaseUrls) -> list[Finding]:
    """Ways to a database on another machine that are not encrypted, or whose other end is not proven."""
    return [
        Finding(
            "database_tls",
            f"{variable} leads to {', '.join(remote)} with sslmode={sslmode(url)}: "
            "add sslmode=verify-full&sslrootcert=/path/to/ca.pem",
        )
        for variable, url in (("DERM_DATABASE_URL", urls.app), ("DERM_OWNER_DATABASE_URL", urls.owner))
        if (remote := remote_hosts(url)) and sslmode(url) != "verify-full"
    ]


def remote_hosts(url: str) -> list[str]:
    """The hosts of a connection URL that are other machines: neither sockets nor loopback."""
    parts = urlsplit(url)
    # The network location may name several, which urlsplit's own `hostname` does not expect.
    places = parts.netloc.rpartition("@")[2].split(",")
    hosts = [place.rpartition("]")[0][1:] or unquote(place.partition(":")[0]) for place in places]
    named = parse_qs(parts.query).get("host") or [os.environ.get("PGHOST", "")]
    if not any(hosts):
        hosts = named[0].split(",")
    return [host for host in hosts if host and not host.startswith(("/", "@")) and not _is_here(host)]


def sslmode(url: str) -> str:
    """How a connection URL asks for TLS, in PostgreSQL's words."""
    asked = parse_qs(urlsplit(url).query).get("sslmode")
    return asked[-1] if asked else os.environ.get("PGSSLMODE", "prefer")


def _is_here(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def access_findings(superuser_dsn: str) -> list[Finding]:
    """Lines of pg_hba.conf that let somebody in without a password or the operating system's word."""
    connection = await asyncpg.connect(superuser_dsn)
    try:
        rows = await connection.fetch(_SQL["client_access"])
    finally:
        await connection.close()
    return [
        Finding(
            "pg_hba",
            f"pg_hba.conf, line {row['line_number']}, says {row['auth_method'] or 'nothing valid'}: "
            "use scram-sha-256 or peer",
        )
        for row in rows
        if row["error"] is not None or row["auth_method"] not in _METHODS
    ]


async def look_at(urls: DatabaseUrls) -> list[Finding]:
    """Everything unsafe about a database and the way to it. RecordsUnavailable when it cannot be reached."""
    pool = await open_pool(urls.app, minimum=0, maximum=1)
    try:
        return [*transport_findings(urls), *await database_findings(pool)]
    finally:
        await pool.close()

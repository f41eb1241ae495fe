"""Whether a node and its database are set up as patients' data needs it: every finding says what is wrong and what to do.

`derm-cds status` prints them and does not call the node ready while there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
import os
from pathlib import Path
import stat
from urllib.parse import parse_qs, quote, unquote, urlsplit

import asyncpg
import psutil

from cluster.deployed import deployed_file
from cluster.key_backups import find_kept_copies
from cluster.node_files import application_role
from cluster.ports import exposed, listeners
from cluster.postgres import SUPERUSER, DatabaseUrls, PostgresState
from cluster.ray_node import belonging, name, on_disk
from serve_app.audit.chain import describe
from serve_app.domain.errors import IntegrityError
from serve_app.erasure.sweeping import read_pause
from serve_app.records.audit_schema import schema_findings
from serve_app.records.migrate import SchemaMismatch, pending
from serve_app.records.pool import Pool, open_pool
from serve_app.records.retention import refuse_lost_keys
from serve_app.settings import NodeFiles, Settings, find_untrustworthy, find_weakness
from serve_app.sql import parse

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
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
#: What a node for development may be and still be ready.
_OF_DEVELOPMENT = frozenset({"env", "token_secret", "object_memory", "trust_file"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something unsafe: a stable name, and one line of what it is and what to do."""

    name: str
    advice: str


def prevents_ready(finding: Finding, *, env: str) -> bool:
    """Whether a node with this finding is not ready; a node for development may be one.

    What a restore kept is there to be gone back to: it is in the way once it has expired.
    """
    if finding.name == "kept_copy":
        return False
    return env == "production" or finding.name not in _OF_DEVELOPMENT


def file_findings(home: Path) -> list[Finding]:
    """Files of keys and secrets, and of what a start runs, that another user may open, or that belong to one."""
    files = NodeFiles(home)
    secret = [files.keyring, files.keystore, files.audit_signing_key, files.audit_checkpoints]
    secret += [home / "secrets" / "service.env", home / "secrets" / "owner.env"]
    secret += [home / "ray" / "token", deployed_file(home), home / "postgres.json", home / "spill"]
    return [finding for path in secret for finding in _private(path)]


async def key_findings(files: NodeFiles, urls: DatabaseUrls | None, *, provider: str) -> list[Finding]:
    """What keeps images from opening, or would: a keyring or a key store that is gone.

    `provider` is DERM_KEY_PROVIDER: only with `file:` alone the keyring is the home's.
    """
    found = []
    if provider == "file:" and files.keystore.exists() and not files.keyring.exists():
        advice = "put its backup back: without it no image opens, and none is accepted"
        found.append(Finding("keyring", f"{files.keyring} is gone: {advice}"))
    if urls is not None:
        pool = await open_pool(urls.app, minimum=0, maximum=1)
        try:
            await refuse_lost_keys(pool, files.keystore)
        except IntegrityError as error:
            found.append(Finding("keystore", str(error)))
        finally:
            await pool.close()
    return found


def copy_findings(home: Path) -> list[Finding]:
    """What restores left: copies that open images erased since, which must be gone in time; retention that waits."""
    found = []
    for copy in find_kept_copies(home):
        if copy.expires_at <= datetime.now(UTC):
            advice = "it has expired, run `derm-cds backup --prune FOLDER`: it undoes erasures made since"
            found.append(Finding("expired_copy", f"{copy.path}: {advice}"))
        else:
            advice = f"delete it when all is well, by {copy.expires_at:%Y-%m-%d} at the latest"
            found.append(Finding("kept_copy", f"{copy.path}: a restore kept it; {advice}"))
    if paused := read_pause(NodeFiles(home).retention_paused):
        advice = "see to revocations, care, holds and reopened records, then `derm-cds retention resume`"
        found.append(Finding("retention_paused", f"nothing is erased by its age {paused}; {advice}"))
    return found


def _private(path: Path) -> Iterator[Finding]:
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError:
        yield Finding("files", f"{path} cannot be looked at: run this as the user that serves")
        return
    if status.st_mode & _OTHERS:
        yield Finding("files", f"{path} is open to other users: chmod go-rwx it")
    if status.st_uid not in {0, os.geteuid()}:
        yield Finding("files", f"{path} belongs to another user: chown it to the one that serves")


def process_findings(home: Path) -> list[Finding]:
    """What is unsafe about a node's processes: Ray without a token, or with objects on a disk; ports open to others."""
    processes = belonging(home)
    found = []
    for process in processes:
        try:
            mode, command = process.environ().get("RAY_AUTH_MODE"), process.cmdline()
        except psutil.Error:
            continue
        if name(process) in {"gcs_server", "raylet"} and mode != "token":
            advice = "start it with `derm-cds serve`: whoever reaches its ports can run code here"
            found.append(Finding("ray_token", f"{name(process)} runs without RAY_AUTH_MODE=token; {advice}"))
        found += [
            Finding(
                "object_memory",
                f"Ray puts images in clear into {folder}, on a disk: "
                "have 300 MB free in /dev/shm (a container: --shm-size=1g) and start again",
            )
            for folder in (on_disk(command) if name(process) == "raylet" else ())
        ]
    named = {process.pid: name(process) for process in processes}
    found += [
        Finding(
            "ports",
            f"{listener.process} listens on {listener.address}:{listener.port}: "
            "bind it to 127.0.0.1, behind a TLS proxy",
        )
        for listener in exposed(listeners(named))
    ]
    return found


def environment_findings(env: str, *, weakness: str | None) -> list[Finding]:
    """What is unsafe about the settings: a node for development, or a secret that is none."""
    found = []
    if env != "production":
        found.append(Finding("env", "DERM_ENV is development: set DERM_ENV=production before patients' data"))
    if weakness:
        found.append(Finding("token_secret", f"DERM_TOKEN_SECRET: {weakness}"))
    return found


def trust_findings(settings: Settings, urls: DatabaseUrls | None) -> list[Finding]:
    """Files that say whom this node believes, or who it is, and that another user could change."""
    of = (urls.app, urls.owner) if urls else ()
    return [Finding("trust_file", said) for said in find_untrustworthy(settings, *of)]


async def all_findings(
    home: Path, urls: DatabaseUrls | None, settings: Settings, *, own: bool
) -> list[Finding]:
    """Everything that can be looked at now; `urls` None while the database does not run.

    `own`: the database is the operator's, so its pg_hba.conf is not ours to read.
    """
    found = [*file_findings(home), *copy_findings(home), *process_findings(home)]
    found += trust_findings(settings, urls)
    if urls is not None:
        found += [*await look_at(urls), *await audit_schema_findings(urls)]
    state = PostgresState.read(home / "postgres.json")
    if urls is not None and state is not None and not own:
        password = quote(state.superuser_password, safe="")
        found += await access_findings(
            f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{state.port}/postgres?sslmode=disable"
        )
    found += await key_findings(NodeFiles(home), urls, provider=settings.key_provider)
    secret = settings.token_secret.get_secret_value()
    return [*found, *environment_findings(settings.env, weakness=find_weakness(secret) if secret else None)]


async def audit_schema_findings(urls: DatabaseUrls) -> list[Finding]:
    """What was done to the tables, triggers, functions and rights of the audit log; nothing of an older schema."""
    try:
        if await pending(urls.owner):
            return []
    except SchemaMismatch:  # which is said in its own place
        return []
    found = await schema_findings(urls.owner, application_role=application_role(urls))
    if not found:
        return []
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    advice = "find out who changed it; `derm-cds audit verify` names all"
    return [Finding("audit_schema", f"{describe(found[0])}{more}: {advice}")]


async def database_findings(pool: Pool) -> list[Finding]:
    """What is unsafe in the database, as far as the role that serves may see; `pool` is that role's."""
    rows = await pool.fetch(_SQL["settings"], [*_SETTINGS, "synchronous_commit"])
    values = {row["name"]: row["setting"] for row in rows}
    found = [
        Finding(name, f"{name} is {values.get(name, 'unknown')}: {advice}")
        for name, (wanted, advice) in _SETTINGS.items()
        if values.get(name) != wanted
    ]
    if (durability := values["synchronous_commit"]) not in _DURABLE:
        advice = "set it to on: a crash loses answers that were given"
        found.append(Finding("synchronous_commit", f"synchronous_commit is {durability}: {advice}"))
    for row in await pool.fetch(_SQL["role"]):
        table, role = row["table_name"], row["role"]
        if row["superuser"]:
            said = "is a superuser"
        elif row["owns"]:
            said = f"owns {table} and can drop what makes it append-only"
        elif row["changes"]:
            said = f"may change {table}"
        else:
            continue
        advice = (
            "name a role of its own in DERM_DATABASE_URL, and the schema's owner in DERM_OWNER_DATABASE_URL"
        )
        said = f"{role}, the role that serves, {said}: {advice}, then derm-cds migrate"
        return [*found, Finding("database_role", said)]
    return found


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

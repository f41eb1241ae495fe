"""Whether a node is set up as patients' data needs it: every finding says what is wrong and what to do.

`derm-cds status` prints them and does not call the node ready while there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
import os
from pathlib import Path
import stat
from urllib.parse import quote

import asyncpg
import psutil

from cluster.listening import exposed, listeners
from cluster.postgres_state import SUPERUSER, PostgresState
from cluster.ray_processes import belonging, name
from serve_app.records.pool import Pool
from serve_app.security.token_secret import find_weakness
from serve_app.settings import NodeFiles, Settings

#: PostgreSQL's parameters that keep a committed assessment through a crash, and bad pages from going unseen.
_SETTINGS: Mapping[str, tuple[str, str]] = {
    "fsync": ("on", "set fsync = on in postgres/etc/local.conf: a crash may lose or corrupt records"),
    "full_page_writes": ("on", "set full_page_writes = on: a crash may tear pages"),
    "data_checksums": ("on", "run pg_checksums --enable on the stopped server: bad pages go unseen"),
    "password_encryption": ("scram-sha-256", "set password_encryption = 'scram-sha-256'"),
}
#: Values of synchronous_commit under which an answer is on this server's disk before the caller has it.
_DURABLE = frozenset({"on", "local", "remote_write", "remote_apply"})
_METHODS = frozenset({"scram-sha-256", "peer", "cert", "reject"})
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class Finding:
    """Something unsafe: a stable name, and one line of what it is and what to do."""

    name: str
    advice: str


async def database_findings(pool: Pool) -> list[Finding]:
    """What is unsafe in the database, as far as the role may see."""
    names = [*_SETTINGS, "synchronous_commit"]
    rows = await pool.fetch("SELECT name, setting FROM pg_settings WHERE name = ANY($1)", names)
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


async def access_findings(superuser_dsn: str) -> list[Finding]:
    """Lines of pg_hba.conf that let somebody in without a password or the operating system's word."""
    connection = await asyncpg.connect(superuser_dsn)
    try:
        rows = await connection.fetch("SELECT line_number, auth_method, error FROM pg_hba_file_rules")
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


def file_findings(home: Path) -> list[Finding]:
    """Files of keys and secrets that another user may open, or that belong to one."""
    files = NodeFiles(home)
    secret = [
        *(files.keyring, files.keystore, files.audit_signing_key, files.audit_checkpoints),
        *(
            home / "secrets" / "service.env",
            home / "secrets" / "owner.env",
            home / "ray" / "token",
            home / "postgres.json",
            home / "spill",
        ),
    ]
    return [finding for path in secret for finding in _private(path)]


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
    """What is unsafe about the running processes of a node: Ray without a token, ports open to others."""
    processes = belonging(home)
    found = []
    for process in processes:
        try:
            mode = process.environ().get("RAY_AUTH_MODE")
        except psutil.Error:
            continue
        if name(process) in {"gcs_server", "raylet"} and mode != "token":
            advice = "start it with `derm-cds serve`: whoever reaches its ports can run code here"
            found.append(Finding("ray_token", f"{name(process)} runs without RAY_AUTH_MODE=token; {advice}"))
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


async def all_findings(home: Path, pool: Pool | None, settings: Settings | None) -> list[Finding]:
    """Everything that can be looked at now; `pool` None while the database does not run."""
    found = [*file_findings(home), *process_findings(home)]
    if pool is not None:
        found += await database_findings(pool)
    state = PostgresState.read(home / "postgres.json")
    if pool is not None and state is not None:
        password = quote(state.superuser_password, safe="")
        found += await access_findings(
            f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{state.port}/postgres?sslmode=disable"
        )
    if settings is not None:
        secret = settings.token_secret.get_secret_value()
        found += environment_findings(settings.env, weakness=find_weakness(secret) if secret else None)
    return found


def prevents_ready(finding: Finding, *, env: str) -> bool:
    """Whether a node with this finding is not ready; a node for development may be one."""
    return env == "production" or finding.name not in {"env", "token_secret"}

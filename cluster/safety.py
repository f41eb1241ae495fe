"""Whether a node is set up as patients' data needs it: every finding says what is wrong and what to do.

`derm-cds status` prints them and does not call the node ready while there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
import os
from pathlib import Path
import stat
from urllib.parse import quote

import psutil

from cluster.database_safety import access_findings, look_at
from cluster.finding import Finding
from cluster.kept_copies import find_kept_copies
from cluster.listening import exposed, listeners
from cluster.object_memory import on_disk
from cluster.postgres_state import SUPERUSER, DatabaseUrls, PostgresState
from cluster.ray_processes import belonging, name
from serve_app.domain.errors import IntegrityError
from serve_app.records.pool import open_pool
from serve_app.records.retention import refuse_lost_keys
from serve_app.settings import NodeFiles, Settings, find_weakness

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


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
    """What restores kept here: it opens images that were erased since, and must be gone in time."""
    found = []
    for copy in find_kept_copies(home):
        if copy.expires_at <= datetime.now(UTC):
            advice = "it has expired, run `derm-cds backup --prune FOLDER`: it undoes erasures made since"
            found.append(Finding("expired_copy", f"{copy.path}: {advice}"))
        else:
            advice = f"delete it when all is well, by {copy.expires_at:%Y-%m-%d} at the latest"
            found.append(Finding("kept_copy", f"{copy.path}: a restore kept it; {advice}"))
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


async def all_findings(
    home: Path, urls: DatabaseUrls | None, settings: Settings | None, *, own: bool
) -> list[Finding]:
    """Everything that can be looked at now; `urls` None while the database does not run.

    `own`: the database is the operator's, so its pg_hba.conf is not ours to read.
    """
    found = [*file_findings(home), *copy_findings(home), *process_findings(home)]
    if urls is not None:
        found += await look_at(urls)
    state = PostgresState.read(home / "postgres.json")
    if urls is not None and state is not None and not own:
        password = quote(state.superuser_password, safe="")
        found += await access_findings(
            f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{state.port}/postgres?sslmode=disable"
        )
    if settings is not None:
        found += await key_findings(NodeFiles(home), urls, provider=settings.key_provider)
        secret = settings.token_secret.get_secret_value()
        found += environment_findings(settings.env, weakness=find_weakness(secret) if secret else None)
    return found

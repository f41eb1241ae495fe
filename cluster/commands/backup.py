"""`derm-cds backup` and `derm-cds restore`: the database, and apart from it the keys."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
import sys
from typing import TypeVar

from cluster.backup import back_up
from cluster.backup_folder import BackupFailed
from cluster.commands.audit import checkpoint_log, sign_restored
from cluster.database import database, own_database
from cluster.erased_keys import read_erased, release_key_store
from cluster.kept_copies import LIFETIME, prune_kept_copies
from cluster.key_backup import back_up_keyring, back_up_keys, prune, restore_keys
from cluster.postgres import EmbeddedPostgres
from cluster.restore import out_of_service, restore
from serve_app.audit.events import account_event
from serve_app.keys.providers import open_key_provider
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, open_pool
from serve_app.settings import NodeFiles, load_key_settings

_Result = TypeVar("_Result")


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `backup` or `restore`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", type=_folder, metavar="FOLDER", help="the database's backup")
    what.add_argument("--keys", type=_folder, metavar="FOLDER", help="the key store's backup, apart")
    if name == "restore":
        parser.set_defaults(run=_restore)
        return
    what.add_argument(
        "--keyring", type=_folder, metavar="FOLDER", help="the keyring's backup, apart from both"
    )
    what.add_argument(
        "--prune",
        type=_folder,
        metavar="FOLDER",
        help="delete key store backups in it that have expired, and what restores kept in the home",
    )
    parser.add_argument(
        "--days",
        type=int,
        default=LIFETIME.days,
        help="how long a key store's backup, or what a restore kept, may be there, and erased images with it"
        " (default: %(default)s)",
    )
    parser.set_defaults(run=_back_up)


def _back_up(arguments: argparse.Namespace) -> int:
    files = NodeFiles(arguments.home)
    service_version = version("pms-derm-cds")
    if arguments.prune:
        lifetime = timedelta(days=arguments.days)
        _record(arguments.home, "backup_prune", kind="keys")
        gone = [*prune(arguments.prune), *prune_kept_copies(arguments.home, lifetime=lifetime)]
        sys.stdout.write(
            "".join(f"{folder} had expired and is deleted\n" for folder in gone) or "nothing has expired\n"
        )
    elif arguments.keys:
        _record(arguments.home, "backup", kind="keys")
        made = back_up_keys(
            files,
            arguments.keys,
            provider=load_key_settings().key_provider,
            lifetime=timedelta(days=arguments.days),
            service_version=service_version,
        )
        sys.stdout.write(f"{arguments.keys}: the key store; delete it by {made['expires_at']}\n")
    elif arguments.keyring:
        _record(arguments.home, "backup", kind="keyring")
        back_up_keyring(files, arguments.keyring, service_version=service_version)
        sys.stdout.write(f"{arguments.keyring}: the keyring; it opens every image, keep it in a safe\n")
    else:
        server = _embedded(arguments.home)
        with database(arguments.home):
            _record(arguments.home, "backup", kind="database")
            made = back_up(server, arguments.folder, service_version=service_version)
        sys.stdout.write(f"{arguments.folder}: the database, {made['bytes'] / 1e6:.0f} MB, verified\n")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    if arguments.keys:
        return _restore_keys(arguments)
    server = _embedded(arguments.home)
    done = restore(server, arguments.folder)
    _record(arguments.home, "restore", kind="database", made_at=done.manifest["made_at"])
    # Or the log would seem to have been cut short: what was signed after the backup is not in it.
    _ask(arguments.home, lambda pool: sign_restored(pool, checkpoint_log(arguments.home)))
    kept = f"; what was there is in {done.kept}: delete it when all is well" if done.kept else ""
    sys.stdout.write(f"the database is as it was at {done.manifest['made_at']}{kept}\n")
    return 0


def _restore_keys(arguments: argparse.Namespace) -> int:
    with out_of_service(arguments.home), database(arguments.home) as urls:
        _record(arguments.home, "restore", kind="keys")
        erased = asyncio.run(read_erased(urls.owner))
        provider = open_key_provider(load_key_settings())
        kept = restore_keys(NodeFiles(arguments.home), arguments.keys, provider, erased=erased)
        asyncio.run(release_key_store(urls.owner))
    said = f"; what was there is in {kept}: delete it when images open" if kept else ""
    sys.stdout.write(f"the key store is restored, without the keys of erased images{said}\n")
    return 0


def _embedded(home: Path) -> EmbeddedPostgres:
    if own_database(home) is not None:
        raise BackupFailed("DERM_DATABASE_URL names your own PostgreSQL: back it up with its own tools.")
    return EmbeddedPostgres(home)


def _record(home: Path, action: str, **detail: object) -> None:
    """Have it in the audit log: a backup before it is made, a pruning before anything is deleted, a restore in what was restored."""
    event = account_event(action, detail)
    _ask(home, lambda pool: LesionStore(pool).record_event(event))


def _ask(home: Path, ask: Callable[[Pool], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1, timeout_s=60)
        try:
            return await ask(pool)
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.app))


def _folder(text: str) -> Path:
    return Path(text).expanduser().resolve()

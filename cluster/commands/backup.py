"""`derm-cds backup` and `derm-cds restore`: the database, and apart from it the keys."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from cluster.backups import BackupFailed, back_up, out_of_service, read_manifest, restore
from cluster.commands.audit import checkpoint_log, sign
from cluster.commands.records import ask, ask_as_owner, record
from cluster.key_backups import (
    LIFETIME,
    back_up_keyring,
    back_up_keys,
    prune,
    prune_kept_copies,
    read_erased,
    release_key_store,
    restore_keys,
)
from cluster.node_files import database, own_database
from cluster.postgres import EmbeddedPostgres
from serve_app.keys.providers import open_key_provider
from serve_app.settings import NodeFiles, load_key_settings


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


def _back_up(arguments: argparse.Namespace) -> None:
    files = NodeFiles(arguments.home)
    if arguments.prune:
        lifetime = timedelta(days=arguments.days)
        record(arguments.home, "backup_prune", {"kind": "keys"})
        gone = [*prune(arguments.prune), *prune_kept_copies(arguments.home, lifetime=lifetime)]
        print("\n".join(f"{folder} had expired and is deleted" for folder in gone) or "nothing has expired")
    elif arguments.keys:
        record(arguments.home, "backup", {"kind": "keys"})
        made = back_up_keys(
            files,
            arguments.keys,
            provider=load_key_settings().key_provider,
            lifetime=timedelta(days=arguments.days),
        )
        print(f"{arguments.keys}: the key store; delete it by {made['expires_at']}")
    elif arguments.keyring:
        record(arguments.home, "backup", {"kind": "keyring"})
        back_up_keyring(files, arguments.keyring)
        print(f"{arguments.keyring}: the keyring; it opens every image, keep it in a safe")
    else:
        server = _embedded(arguments.home)
        with database(arguments.home):
            record(arguments.home, "backup", {"kind": "database"})
            made = back_up(server, arguments.folder)
        print(f"{arguments.folder}: the database, {made['bytes'] / 1e6:.0f} MB, verified")


def _restore(arguments: argparse.Namespace) -> None:
    if arguments.keys:
        _restore_keys(arguments)
        return
    server = _embedded(arguments.home)
    there = restore(server, arguments.folder)
    made_at = read_manifest(arguments.folder, "database")["made_at"]
    record(arguments.home, "restore", {"kind": "database", "made_at": made_at})
    # Or the log would seem to have been cut short: what was signed after the backup is not in it.
    ask(arguments.home, lambda pool: sign(pool, checkpoint_log(arguments.home), restored=True))
    kept = f"; what was there is in {there}: delete it when all is well" if there else ""
    print(f"the database is as it was at {made_at}{kept}")


def _restore_keys(arguments: argparse.Namespace) -> None:
    with out_of_service(arguments.home), database(arguments.home):
        record(arguments.home, "restore", {"kind": "keys"})
        erased = ask_as_owner(arguments.home, read_erased)
        provider = open_key_provider(load_key_settings())
        kept = restore_keys(NodeFiles(arguments.home), arguments.keys, provider, erased=erased)
        ask_as_owner(arguments.home, release_key_store)
    said = f"; what was there is in {kept}: delete it when images open" if kept else ""
    print(f"the key store is restored, without the keys of erased images{said}")


def _embedded(home: Path) -> EmbeddedPostgres:
    if own_database(home) is not None:
        raise BackupFailed("DERM_DATABASE_URL names your own PostgreSQL: back it up with its own tools.")
    return EmbeddedPostgres(home)


def _folder(text: str) -> Path:
    return Path(text).expanduser().resolve()

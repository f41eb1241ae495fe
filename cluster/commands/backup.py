"""`derm-cds backup` and `derm-cds restore`: the database, and apart from it the keys."""

from __future__ import annotations

import argparse
from datetime import timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cluster.backup_folder import BackupFailed
from cluster.backups import back_up, check, out_of_service, restore
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
from cluster.node_files import database, own_database, refuse_nothing
from cluster.postgres import EmbeddedPostgres
from serve_app.audit.checkpoints import read_public_key, signing_key
from serve_app.domain.errors import Conflict
from serve_app.keys.providers import open_key_provider
from serve_app.settings import NodeFiles, load_key_settings


def define(name: str, parser: argparse.ArgumentParser) -> None:
    """Define `backup` or `restore`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", type=_folder, metavar="FOLDER", help="the database's backup")
    what.add_argument("--keys", type=_folder, metavar="FOLDER", help="the key store's backup, apart")
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="what `audit public-key` printed where the backup was made (default: this node's own key)",
    )
    parser.add_argument(
        "--accept-unsigned",
        action="store_true",
        help="take a backup whose signature cannot be checked: of before there were any, or whose key is lost",
    )
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
    what.add_argument(
        "--check",
        type=_folder,
        metavar="FOLDER",
        help="hold a backup, of whatever kind, against its signature",
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
    if arguments.check:
        made = check(arguments.check, _trusted(arguments))
        print(f"{arguments.check}: the {made['kind']}, as it was backed up at {made['made_at']}")
    elif arguments.prune:
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
    done = restore(server, arguments.folder, _trusted(arguments))
    # Or the log would seem to have been cut short: what was signed after the backup is not in it.
    ask(arguments.home, lambda pool: sign(pool, checkpoint_log(arguments.home), restored=True))
    kept = f"; what was there is in {done.kept}: delete it when all is well" if done.kept else ""
    print(f"the database is as it was at {done.made_at}{kept}")
    print(f"carried over from what it replaced: {done.carried} changes of access, holds and closed records")
    if done.doubt:
        print(f"retention waits: {done.doubt}. See to them, then `derm-cds retention resume`")


def _restore_keys(arguments: argparse.Namespace) -> None:
    refuse_nothing(arguments.home)
    trusted = _trusted(arguments)
    with out_of_service(arguments.home), database(arguments.home):
        record(arguments.home, "restore", {"kind": "keys", "signed": trusted is not None})
        erased = ask_as_owner(arguments.home, read_erased)
        provider = open_key_provider(load_key_settings())
        files = NodeFiles(arguments.home)
        kept = restore_keys(files, arguments.keys, provider, trusted=trusted, erased=erased)
        ask_as_owner(arguments.home, release_key_store)
    said = f"; what was there is in {kept}: delete it when images open" if kept else ""
    print(f"the key store is restored, without the keys of erased images{said}")


def _trusted(arguments: argparse.Namespace) -> Ed25519PublicKey | None:
    """The key that must have signed a backup; None where the operator takes it without."""
    if arguments.accept_unsigned:
        return None
    if arguments.public_key:
        return read_public_key(arguments.public_key)
    own = NodeFiles(arguments.home).audit_signing_key
    if not own.exists():
        raise Conflict(
            f"Nothing here says who may have made the backup: there is no {own}. Give --public-key FILE, what "
            "`derm-cds audit public-key` printed where it was made."
        )
    return signing_key(own).public_key()


def _embedded(home: Path) -> EmbeddedPostgres:
    if own_database(home) is not None:
        raise BackupFailed("DERM_DATABASE_URL names your own PostgreSQL: back it up with its own tools.")
    return EmbeddedPostgres(home)


def _folder(text: str) -> Path:
    return Path(text).expanduser().resolve()

"""`derm-cds keys`: the key-encryption keys that wrap every image's data key."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
import sys

from cluster.commands import actions_of
from cluster.commands.records import ask, record
from cluster.key_backups import existing_keystore
from serve_app.domain.errors import Conflict, DermError
from serve_app.erasure.sweeping import (
    OrphanedKeys,
    find_orphaned_keys,
    shred_orphaned_keys,
    stop_awaiting_stored,
)
from serve_app.keys.keyring import KeyProvider
from serve_app.keys.keystore import MAX_WRAPS, KeyStore
from serve_app.keys.providers import open_key_provider
from serve_app.records.pool import Pool
from serve_app.records.retention import Housekeeping
from serve_app.settings import load_key_settings


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `keys`."""
    action = actions_of(parser)
    action("status", _status, "say which versions there are and what they wrap")
    action("rotate", _rotate, "make a new key-encryption key, for all images from now on")
    action("rewrap", _rewrap, "wrap older images' data keys under the current key; started again, it goes on")
    sweep = action("sweep", _sweep, "count the data keys without an image, and destroy them with --yes")
    sweep.add_argument("--yes", action="store_true", help="destroy them: their images never open again")
    retire = action("retire", _retire, "destroy an old key-encryption key that wraps nothing any more")
    retire.add_argument("version", type=int)
    others = retire.add_mutually_exclusive_group()
    others.add_argument(
        "--also",
        type=Path,
        action="append",
        default=[],
        metavar="KEYSTORE",
        help="another key store that these keys wrap for (repeatable); a keyring knows its own",
    )
    others.add_argument(
        "--alone", action="store_true", help="no other key store is in use: whatever one holds may be lost"
    )


def _status(arguments: argparse.Namespace) -> None:
    provider = _provider(arguments)
    with closing(_keystore(arguments, provider)) as store:
        counts = {count.key_version: count for count in store.count_versions()}
    current, versions = provider.current_version, provider.versions
    print(provider)
    for path in _others(arguments, provider):
        print(f"also wraps for {path}")
    for version in sorted({*counts, *versions}):
        count = counts.get(version)
        wraps, data_keys = (count.wraps, count.data_keys) if count else (0, 0)
        state = "current" if version == current else "old" if version in versions else "retired"
        print(
            f"version {version} ({state}): wraps {data_keys} data keys; "
            f"{wraps} of at most {MAX_WRAPS} wraps used"
        )


def _rotate(arguments: argparse.Namespace) -> None:
    provider = _provider(arguments)
    with (
        closing(_keystore(arguments, provider)) as store,  # other keys show here, before anything changes
        _recorded(arguments, "key_rotate", provider=str(provider), from_version=provider.current_version),
    ):
        version = provider.rotate()
        store.checks.verify()  # so that a keyring from before is known for what it is, from now on
    print(f"version {version} wraps from now on; `derm-cds keys rewrap` does the rest")


def _rewrap(arguments: argparse.Namespace) -> None:
    provider = _provider(arguments)
    done = 0
    to = provider.current_version
    with (
        closing(_keystore(arguments, provider)) as store,
        _recorded(arguments, "key_rewrap", provider=str(provider), to_version=to),
    ):
        while found := store.rewrap():
            done += found
            if sys.stdout.isatty():
                print(f"{done} data keys rewrapped", end="\r", flush=True)
    print(f"{done} data keys rewrapped; all are under version {provider.current_version}")


def _retire(arguments: argparse.Namespace) -> None:
    provider, version = _provider(arguments), arguments.version
    with ExitStack() as opened:
        stores = [opened.enter_context(closing(_keystore(arguments, provider)))]
        if not arguments.alone:
            stores += [
                opened.enter_context(closing(_other_keystore(path, provider)))
                for path in {*_others(arguments, provider), *arguments.also}
            ]
            if provider.key_stores is None and not arguments.also:
                raise Conflict(
                    f"{provider} does not say whose data keys it wraps: name every other key store with --also, "
                    "or say --alone when there is none. What is not counted would be lost."
                )
        with _recorded(
            arguments,
            "key_retire",
            provider=str(provider),
            version=version,
            key_stores=[str(store.store_id) for store in stores],
        ):
            provider.check_retirement(version)
            # Each counts and refuses at one moment: nothing comes under the version between count and destruction.
            for store in stores:
                store.retire(version)
            provider.retire(version)
    print(f"version {version} is destroyed; backups of the key store made under it open nothing")


def _others(arguments: argparse.Namespace, provider: KeyProvider) -> list[Path]:
    """The other key stores that the provider knows to be under its keys."""
    own = existing_keystore(arguments.home).resolve()
    return [path for path in (provider.key_stores or {}).values() if path != own]


def _other_keystore(path: Path, provider: KeyProvider) -> KeyStore:
    if not path.exists():
        raise Conflict(
            f"The key store {path} is under these keys, too, and cannot be counted: have it there, or say --alone "
            "when it is gone for good."
        )
    return KeyStore(path, provider)


def _sweep(arguments: argparse.Namespace) -> None:
    with closing(_keystore(arguments, _provider(arguments))) as store:

        async def find(pool: Pool) -> OrphanedKeys:
            await stop_awaiting_stored(Housekeeping(pool), store)
            return await find_orphaned_keys(Housekeeping(pool), store)

        orphaned = ask(arguments.home, find)
        print(f"{len(orphaned.failed)} data keys of uploads that failed, more than an hour ago")
        print(
            f"{len(orphaned.lost)} data keys of images that this database has no more, or whose upload failed "
            "before this version"
        )
        if not arguments.yes:
            if orphaned.lost:
                print(
                    "if an older database was restored, put the newer one back: with --yes its images are lost"
                )
            return
        counts = {"failed": len(orphaned.failed), "lost": len(orphaned.lost)}
        with _recorded(arguments, "key_sweep", **counts):
            everything = [*orphaned.failed, *orphaned.lost]
            done = ask(
                arguments.home, lambda pool: shred_orphaned_keys(Housekeeping(pool), store, everything)
            )
    print(f"{done} data keys are destroyed")


def _provider(arguments: argparse.Namespace) -> KeyProvider:
    existing_keystore(arguments.home)  # looking for a keyring makes its folder
    return open_key_provider(load_key_settings())


def _keystore(arguments: argparse.Namespace, provider: KeyProvider) -> KeyStore:
    return KeyStore(existing_keystore(arguments.home), provider)


@contextmanager
def _recorded(arguments: argparse.Namespace, action: str, **detail: object) -> Iterator[None]:
    """Have it in the audit log first, for what cannot be audited does not happen; and again when it fails."""
    record(arguments.home, action, detail)
    try:
        yield
    except DermError:
        record(arguments.home, action, detail, outcome="failed")
        raise

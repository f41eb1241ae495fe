"""`derm-cds keys`: the key-encryption keys that wrap every image's data key."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
import sys
from typing import TypeVar

from cluster.database import database
from cluster.key_backup import existing_keystore
from serve_app.audit.events import AuditOutcome, account_event
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
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, open_pool
from serve_app.records.retention import Housekeeping
from serve_app.settings import load_key_settings

_Result = TypeVar("_Result")


def define(_name: str, parser: argparse.ArgumentParser) -> None:
    """Define `keys`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, run, purpose in (
        ("status", _status, "say which versions there are and what they wrap"),
        ("rotate", _rotate, "make a new key-encryption key, for all images from now on"),
        ("rewrap", _rewrap, "wrap older images' data keys under the current key; started again, it goes on"),
    ):
        actions.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}."
        ).set_defaults(run=run)
    sweep = actions.add_parser(
        "sweep", help="count the data keys without an image, and destroy them with --yes"
    )
    sweep.add_argument("--yes", action="store_true", help="destroy them: their images never open again")
    sweep.set_defaults(run=_sweep)
    retire = actions.add_parser(
        "retire", help="destroy an old key-encryption key that wraps nothing any more"
    )
    retire.add_argument("version", type=int)
    retire.set_defaults(run=_retire)


def _status(arguments: argparse.Namespace) -> int:
    provider = _provider()
    with closing(_keystore(arguments, provider)) as store:
        counts = {count.key_version: count for count in store.count_versions()}
    current, versions = provider.current_version, provider.versions
    sys.stdout.write(f"{provider}\n")
    for version in sorted({*counts, *versions}):
        count = counts.get(version)
        wraps, data_keys = (count.wraps, count.data_keys) if count else (0, 0)
        state = "current" if version == current else "old" if version in versions else "retired"
        sys.stdout.write(
            f"version {version} ({state}): wraps {data_keys} data keys; "
            f"{wraps} of at most {MAX_WRAPS} wraps used\n"
        )
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    provider = _provider()
    with (
        closing(_keystore(arguments, provider)) as store,  # other keys show here, before anything changes
        _recorded(arguments, "key_rotate", provider=str(provider), from_version=provider.current_version),
    ):
        version = provider.rotate()
        store.checks.verify()  # so that a keyring from before is known for what it is, from now on
    sys.stdout.write(f"version {version} wraps from now on; `derm-cds keys rewrap` does the rest\n")
    return 0


def _rewrap(arguments: argparse.Namespace) -> int:
    provider = _provider()
    done = 0
    to = provider.current_version
    with (
        closing(_keystore(arguments, provider)) as store,
        _recorded(arguments, "key_rewrap", provider=str(provider), to_version=to),
    ):
        while found := store.rewrap():
            done += found
            sys.stdout.write(f"\r{done} data keys rewrapped")
            sys.stdout.flush()
    sys.stdout.write(f"\r{done} data keys rewrapped; all are under version {provider.current_version}\n")
    return 0


def _retire(arguments: argparse.Namespace) -> int:
    provider = _provider()
    with closing(_keystore(arguments, provider)) as store:
        counts = {count.key_version: count.data_keys for count in store.count_versions()}
    if counts.get(arguments.version):
        raise Conflict(
            f"Version {arguments.version} wraps {counts[arguments.version]} data keys: `derm-cds keys rewrap` first."
        )
    with _recorded(arguments, "key_retire", provider=str(provider), version=arguments.version):
        provider.retire(arguments.version)
    sys.stdout.write(
        f"version {arguments.version} is destroyed; backups of the key store made under it open nothing\n"
    )
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    with closing(_keystore(arguments, _provider())) as store:

        async def find(pool: Pool) -> OrphanedKeys:
            await stop_awaiting_stored(Housekeeping(pool), store)
            return await find_orphaned_keys(Housekeeping(pool), store)

        orphaned = _ask(arguments.home, find)
        sys.stdout.write(
            f"{len(orphaned.failed)} data keys of uploads that failed, more than an hour ago\n"
            f"{len(orphaned.lost)} data keys of images that this database has no more, or whose upload failed "
            "before this version\n"
        )
        if not arguments.yes:
            if orphaned.lost:
                sys.stdout.write(
                    "if an older database was restored, put the newer one back: with --yes its images are lost\n"
                )
            return 0
        counts = {"failed": len(orphaned.failed), "lost": len(orphaned.lost)}
        with _recorded(arguments, "key_sweep", **counts):
            everything = [*orphaned.failed, *orphaned.lost]
            done = _ask(
                arguments.home, lambda pool: shred_orphaned_keys(Housekeeping(pool), store, everything)
            )
    sys.stdout.write(f"{done} data keys are destroyed\n")
    return 0


def _provider() -> KeyProvider:
    return open_key_provider(load_key_settings())


def _keystore(arguments: argparse.Namespace, provider: KeyProvider) -> KeyStore:
    return KeyStore(existing_keystore(arguments.home), provider)


@contextmanager
def _recorded(arguments: argparse.Namespace, action: str, **detail: object) -> Iterator[None]:
    """Have it in the audit log first, for what cannot be audited does not happen; and again when it fails."""
    _record(arguments, action, "success", detail)
    try:
        yield
    except DermError:
        _record(arguments, action, "failed", detail)
        raise


def _record(
    arguments: argparse.Namespace, action: str, outcome: AuditOutcome, detail: dict[str, object]
) -> None:
    event = account_event(action, detail, outcome=outcome)

    _ask(arguments.home, lambda pool: LesionStore(pool).record_event(event))


def _ask(home: Path, ask: Callable[[Pool], Awaitable[_Result]]) -> _Result:
    async def run(dsn: str) -> _Result:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            return await ask(pool)
        finally:
            await pool.close()

    with database(home) as urls:
        return asyncio.run(run(urls.app))

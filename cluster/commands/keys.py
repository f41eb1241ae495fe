"""`derm-cds keys`: the key-encryption keys that wrap every image's data key."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
import sys

from cluster.database import database
from serve_app.domain.errors import Conflict, DermError
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import open_pool
from serve_app.security.account import account_event
from serve_app.security.audit import AuditOutcome
from serve_app.security.key_providers.choice import open_key_provider
from serve_app.security.keyring import KeyProvider
from serve_app.security.keystore import MAX_WRAPS, KeyStore
from serve_app.settings import NodeFiles, load_key_settings


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
    _keystore(arguments, provider).close()  # another provider's keys show here, before anything changes
    with _recorded(arguments, "key_rotate", provider=str(provider), from_version=provider.current_version):
        version = provider.rotate()
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


def _provider() -> KeyProvider:
    return open_key_provider(load_key_settings())


def _keystore(arguments: argparse.Namespace, provider: KeyProvider) -> KeyStore:
    return KeyStore(NodeFiles(arguments.home).keystore, provider)


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

    async def write(dsn: str) -> None:
        pool = await open_pool(dsn, minimum=0, maximum=1)
        try:
            await LesionStore(pool).record_event(event)
        finally:
            await pool.close()

    with database(arguments.home) as urls:
        asyncio.run(write(urls.app))

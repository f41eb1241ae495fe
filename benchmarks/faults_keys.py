"""Keys that cannot be had: a keyring away, a key store that another process locks, a Vault in trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
import sqlite3

from benchmarks.key_service import KeyService
from benchmarks.vault_server import Vault
from serve_app.settings import NodeFiles

#: Puts things right again.
Mend = Callable[[], None]


def take_keyring(files: NodeFiles) -> Mend:
    """Move the keyring away, as a share that is not mounted does."""
    away = files.keyring.with_suffix(".away")
    files.keyring.rename(away)

    def back() -> None:
        away.rename(files.keyring)

    return back


def lock_store(files: NodeFiles) -> Mend:
    """Hold the key store's write lock, as a process that hangs in a transaction does."""
    connection = sqlite3.connect(files.keystore, isolation_level=None, timeout=5.0, check_same_thread=False)
    connection.execute("BEGIN EXCLUSIVE")

    def back() -> None:
        connection.execute("ROLLBACK")
        connection.close()

    return back


@contextmanager
def running_vault(folder: Path) -> Iterator[tuple[KeyService, dict[str, object]]]:
    """A transit engine on loopback, and the settings of a service that keeps its KEKs there."""
    transit = Vault()
    transit.make_key("derm")
    token = folder / "vault-token"
    token.write_text(transit.token)
    service = KeyService(transit)
    try:
        url = f"vault+http://127.0.0.1:{service.port}/transit/derm"
        yield service, {"key_provider": url, "vault_token_file": token}
    finally:
        service.down()


def stop_vault(service: KeyService) -> Mend:
    """Have the server refuse connections and break those that it has."""
    service.down()
    return service.up


def seal_vault(service: KeyService) -> Mend:
    """Have every request answered 503, as a sealed Vault answers."""
    service.always = 503

    def unseal() -> None:
        service.always = None

    return unseal

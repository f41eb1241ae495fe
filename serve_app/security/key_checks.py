"""Which key-encryption keys a key store belongs to, so that nothing is ever wrapped under others.

Under every version that wraps for it, a key store keeps a known constant wrapped. Keys that do not
unwrap the newest of these are not this store's: another node's keyring, one made anew, one from
before a rotation. What they wrapped would be lost as soon as the right ones are back.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
import sqlite3
from uuid import UUID

from serve_app.domain.errors import IntegrityError, KeyProviderUnavailable
from serve_app.security.keyring import KeyProvider, Keys, WrappedKey

#: As long as a data key, which is all that a provider unwraps, and under an id that no data key has.
_CONSTANT, _CONSTANT_ID = b"derm-cds: a key store's own keys", UUID(int=0)

_SQL = {
    name: (Path(__file__).parent / "queries" / f"{name}.sql").read_text()
    for name in ("select_key_checks", "insert_key_check", "select_newest")
}


class KeyChecks:
    """Wraps for one key store, under its own keys only; for many threads."""

    def __init__(
        self, provider: KeyProvider, transaction: Callable[[], AbstractContextManager[sqlite3.Connection]]
    ) -> None:
        self._provider = provider
        self._transaction = transaction
        self._verified: Keys | None = None
        self._versions: frozenset[int] = frozenset()

    def wrap(self, data_key: bytes, data_key_id: UUID) -> WrappedKey:
        """Wrap a data key under the current version. KeyProviderUnavailable while that is not of this store's keys."""
        keys = self.keys()
        wrapped = keys.wrap(data_key, data_key_id)
        if wrapped.key_version not in self._versions:  # made elsewhere meanwhile, as Vault's may be
            self._insist(keys)
        return wrapped

    def keys(self) -> Keys:
        """The keys that wrap now, as the provider has them. KeyProviderUnavailable while they are not this store's."""
        keys = self._provider.now()
        if keys is not self._verified:
            self._insist(keys)
        return keys

    def verify(self) -> None:
        """See that the provider's keys are this store's, and remember their newest version. IntegrityError when not.

        A store without anything takes the first keys that it is opened with.
        """
        self._verify(self._provider.now())

    def _insist(self, keys: Keys) -> None:
        # To an upload, other keys are a provider that is away: with the right ones back, it can be sent again.
        try:
            self._verify(keys)
        except IntegrityError as error:
            raise KeyProviderUnavailable(f"{error}; nothing was stored.") from error

    def _verify(self, keys: Keys) -> None:
        with self._transaction() as connection:
            checks = dict(connection.execute(_SQL["select_key_checks"]).fetchall())
            newest = connection.execute(_SQL["select_newest"]).fetchone()
        if checks:
            last = max(checks)
            self._unwrap(keys, WrappedKey(checks[last], last), _CONSTANT_ID)
        if newest:  # one made before there were checks, or under a version that is lost
            self._unwrap(keys, WrappedKey(*newest[1:]), UUID(bytes=newest[0]))
        if keys.current_version not in checks:
            checks = self._remember(keys)
        self._versions, self._verified = frozenset(checks), keys

    def _remember(self, keys: Keys) -> dict[int, bytes]:
        # Not counted as a wrap: it is one a version, and the bound has as much again to spare.
        mine = keys.wrap(_CONSTANT, _CONSTANT_ID)
        row = {"key_version": mine.key_version, "wrapped": mine.wrapped}
        with self._transaction() as connection:
            connection.execute(_SQL["insert_key_check"], row)
            checks: dict[int, bytes] = dict(connection.execute(_SQL["select_key_checks"]).fetchall())
        # Another process may have been first, and with other keys.
        self._unwrap(keys, WrappedKey(checks[mine.key_version], mine.key_version), _CONSTANT_ID)
        return checks

    def _unwrap(self, keys: Keys, wrapped: WrappedKey, data_key_id: UUID) -> None:
        try:
            keys.unwrap(wrapped, data_key_id)
        except IntegrityError as error:
            raise IntegrityError(
                f"{self._provider} did not wrap what is in this key store ({error}): put the keys back that it "
                "was made with (keyring.json, or DERM_KEY_PROVIDER)"
            ) from error

"""The wrapped data keys, in a SQLite file apart from the clinical database.

Key first, then ciphertext: a key is on disk before the caller has it, so that no stored
image can be without its key. No backup of the clinical database holds a key, so that
shredding one here makes its image unreadable there, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
import sqlite3
from threading import Lock
from typing import Any, TypeVar
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from serve_app.domain.errors import (
    Conflict,
    DataKeyMissing,
    Erased,
    IntegrityError,
    KeyProviderUnavailable,
    RecordsUnavailable,
)
from serve_app.keys.envelope import DataKey, ImageBinding, data_key_id_of, open_sealed
from serve_app.keys.keyring import KeyProvider, Keys, WrappedKey
from serve_app.private_files import locked_folder, touch_private
from serve_app.sql import parse

#: Half of what NIST SP 800-38D (8.3) allows; its table has the check.
MAX_WRAPS = 2**31

_BUSY_TIMEOUT_S = 5.0

_SQL = parse(Path(__file__).with_suffix(".sql").read_text())

#: As long as a data key, which is all that a provider unwraps, and under an id that no data key has.
_CONSTANT, _CONSTANT_ID = b"derm-cds: a key store's own keys", UUID(int=0)


_Done = TypeVar("_Done")


class VersionRetired(KeyProviderUnavailable):
    """The key-encryption key that wrapped it is retired; nothing was stored, try again."""


@dataclass(frozen=True, slots=True)
class KeyVersionCount:
    """One KEK version: its wraps so far (at most MAX_WRAPS), and the data keys that it wraps now."""

    key_version: int
    wraps: int
    data_keys: int


@dataclass(frozen=True, slots=True)
class DestroyedKey:
    """A data key that is destroyed with its image: which erasure does so, why and for whom.

    `proven`: it is known to be gone, by a receipt or by the key store that destroyed it.
    """

    data_key_id: UUID
    receipt_id: UUID
    reason: str
    actor: str
    proven: bool = field(default=False, compare=False, kw_only=True)


class KeyStore:
    """Makes, finds and shreds data keys; for many threads, and many processes on one file.

    Every call blocks on the disk: from a coroutine, use `asyncio.to_thread`. One connection
    a process, used in turn: a commit waits for the disk, not for its neighbours.
    RecordsUnavailable when the file cannot be reached or written, IntegrityError when it is
    damaged, open to other users, or another keyring's (KeyChecks). `store_id` is the same in every backup of it.
    """

    def __init__(self, path: Path, provider: KeyProvider) -> None:
        self._path, self._provider = path, provider
        self.checks = KeyChecks(provider, self._transaction)
        self._turn = Lock()
        with ExitStack() as on_failure, _sqlite_errors():
            with locked_folder(path.parent):
                touch_private(path)
                self._connection = sqlite3.connect(
                    path, timeout=_BUSY_TIMEOUT_S, isolation_level="IMMEDIATE", check_same_thread=False
                )
                on_failure.callback(self._connection.close)
                self._connection.executescript(_SQL["open_store"])
            # A lost or replaced keyring shows at start, not at the first download.
            self.checks.verify()
            self.store_id = _identity(self._connection)
            # Before it wraps anything: whoever retires a version looks into every key store that is known.
            provider.register(self.store_id, path)
            on_failure.pop_all()

    def create(self) -> DataKey:
        """Make a data key that seals one image; it is on disk when this returns.

        RecordsUnavailable, too, when the current KEK has wrapped its share; KeyProviderUnavailable as KeyChecks.
        """
        data_key_id, material = uuid4(), AESGCM.generate_key(256)

        def wrap_and_keep() -> None:
            row = _bind(data_key_id=data_key_id, **asdict(self.checks.wrap(material, data_key_id)))
            with self._transaction() as connection:
                for name in ("count_wrap", "insert_data_key", "insert_awaited_key"):
                    connection.execute(_SQL[name], row)

        _unless_retired(wrap_and_keep)
        return DataKey(data_key_id, material, spent=False)

    def load(self, data_key_id: UUID) -> DataKey:
        """Find the key of a sealed image; it opens only.

        Erased when it was destroyed with its image, DataKeyMissing when it was never here or is lost.
        """
        row = _bind(data_key_id=data_key_id)
        with self._transaction() as connection:
            found = connection.execute(_SQL["select_data_key"], row).fetchone()
            destroyed = not found and connection.execute(_SQL["select_destroyed_key"], row).fetchone()
        if destroyed:
            raise Erased
        if not found:
            raise DataKeyMissing
        return DataKey(data_key_id, self._provider.unwrap(WrappedKey(*found), data_key_id), spent=True)

    def open_image(self, sealed: bytes, binding: ImageBinding) -> bytes:
        """Decrypt a sealed image with its key. Raises as `load`; IntegrityError when altered or bound to another."""
        return open_sealed(sealed, data_key=self.load(data_key_id_of(sealed)), binding=binding)

    def rewrap(self, limit: int = 100) -> int:
        """Wrap up to `limit` data keys anew that an older KEK wrapped; returns how many were found.

        0 when all are under the current KEK. Stopped at any moment, it goes on where it was; images
        are opened meanwhile as ever. RecordsUnavailable as `create`.
        """
        return _unless_retired(lambda: self._rewrap(limit))

    def _rewrap(self, limit: int) -> int:
        current, rows = self.checks.keys().current_version, []
        # Unwrapping and wrapping may ask a service: nobody's transaction waits for that.
        for key, wrapped, version in self._fetch("select_stale", current=current, limit=limit):
            data_key_id = UUID(bytes=key)
            material = self._provider.unwrap(WrappedKey(wrapped, version), data_key_id)
            new = self.checks.wrap(material, data_key_id)
            rows.append(_bind(data_key_id=data_key_id, old_version=version, **asdict(new)))
        with self._transaction() as connection:
            connection.executemany(_SQL["count_wrap"], rows)
            connection.executemany(_SQL["replace_wrapped"], rows)
        return len(rows)

    def count_versions(self) -> list[KeyVersionCount]:
        """Say of every KEK version how many data keys it wraps, and how often it has wrapped."""
        return [KeyVersionCount(*row) for row in self._fetch("count_versions")]

    def retire(self, version: int) -> None:
        """Keep nothing under this version of the KEK from now on, so that it can be destroyed; safe to repeat.

        What a slow upload or rewrap wrapped under it before is refused when it comes, and wrapped anew. Conflict
        while a data key is under it.
        """
        self.checks.verify()  # the store is known by a newer version, and not by this one alone
        row = {"key_version": version}
        with self._transaction() as connection:
            connection.execute(_SQL["insert_retired_version"], row)
            (count,) = connection.execute(_SQL["count_data_keys"], row).fetchone()
        if count:
            raise Conflict(
                f"Version {version} wraps {count} data keys in {self._path}: `derm-cds keys rewrap` there first."
            )

    def shred(self, *data_key_ids: UUID) -> None:
        """Destroy keys for good: on return no file of this store holds them. Safe to repeat.

        RecordsUnavailable when they may linger in the write-ahead log: then repeat.
        """
        self._forget("delete_data_key", data_key_ids)
        self._empty_log()

    def destroy(self, key: DestroyedKey) -> None:
        """Shred the key of an erased image and remember that it was; safe to repeat.

        DataKeyMissing, with nothing remembered, when the key is not here and was never destroyed here: whoever
        proves an erasure by it would prove nothing. Not for one that is `proven`. RecordsUnavailable as `shred`.
        """
        row = _bind(**asdict(key))
        with self._transaction() as connection:
            known = key.proven or connection.execute(_SQL["select_destroyed_key"], row).fetchone()
            if connection.execute(_SQL["delete_data_key"], row).rowcount != 1 and not known:
                raise DataKeyMissing
            connection.execute(_SQL["insert_destroyed_key"], row)
        self._empty_log()

    def list_destroyed(self, *, after: int = 0, limit: int = 1000) -> list[tuple[int, DestroyedKey]]:
        """List keys that were destroyed with their images, each behind its sequence number, oldest first."""
        return [
            (sequence, DestroyedKey(UUID(bytes=key), UUID(bytes=receipt), reason, actor, proven=True))
            for sequence, key, receipt, reason, actor in self._fetch(
                "select_destroyed_keys", after=after, limit=limit
            )
        ]

    def list_made_before(
        self, age_s: int, *, after: int = 0, limit: int = 1000
    ) -> list[tuple[int, UUID, bool]]:
        """List sequence number, id and "its image is still awaited" of keys this old (seconds) at least, oldest first."""
        rows = self._fetch("select_old_keys", age=f"-{age_s} seconds", after=after, limit=limit)
        return [(sequence, UUID(bytes=key), bool(awaited)) for sequence, key, awaited in rows]

    def list_awaited(self, *, after: UUID | None = None, limit: int = 1000) -> list[UUID]:
        """List data keys whose image was not seen in the database yet, by id, from behind `after` on."""
        rows = self._fetch("select_awaited_keys", after=after or b"", limit=limit)
        return [UUID(bytes=key) for (key,) in rows]

    def stop_awaiting(self, data_key_ids: Iterable[UUID]) -> None:
        """Remember that the images of these keys are in the database: from now on such a key is no failed upload's."""
        self._forget("delete_awaited_key", data_key_ids)

    def _fetch(self, name: str, **values: object) -> list[Any]:
        with self._transaction() as connection:
            return connection.execute(_SQL[name], _bind(**values)).fetchall()

    def _forget(self, name: str, data_key_ids: Iterable[UUID]) -> None:
        with self._transaction() as connection:
            connection.executemany(_SQL[name], [_bind(data_key_id=each) for each in data_key_ids])

    def _empty_log(self) -> None:
        ((lingers, _, _),) = self._fetch("empty_log")
        if lingers:
            raise RecordsUnavailable("The key is deleted but not yet overwritten; try again")

    def close(self) -> None:
        """Let go of the file."""
        with self._turn:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _sqlite_errors(), self._turn, self._connection as connection:
            yield connection


class KeyChecks:
    """Wraps for one key store, under its own key-encryption keys only; for many threads.

    Under every version that wraps for it, a key store keeps a known constant wrapped. Keys that do not unwrap
    the newest of these are not this store's: another node's keyring, one made anew, one from before a rotation.
    What they wrapped would be lost as soon as the right ones are back.
    """

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
        """The provider's keys that wrap now. KeyProviderUnavailable while they are not this store's."""
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
        with self._transaction() as connection:
            connection.execute(_SQL["insert_key_check"], asdict(mine))
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


def look_into(path: Path, data_key_ids: Iterable[UUID]) -> tuple[UUID, bool] | None:
    """The id of the key store at `path`, and whether it knows any of these keys, destroyed ones too.

    None where there is no store. RecordsUnavailable and IntegrityError as `KeyStore`.
    """
    if not path.exists():
        return None
    with _sqlite_errors(), closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
        connection.executescript(_SQL["open_store"])
        known = any(
            connection.execute(_SQL[name], _bind(data_key_id=data_key_id)).fetchone()
            for data_key_id in data_key_ids
            for name in ("select_data_key", "select_destroyed_key")
        )
        return _identity(connection), known


def _unless_retired(wrap_and_keep: Callable[[], _Done]) -> _Done:
    """Wrap and keep; once more where the version was retired in between, for then there is a newer one."""
    try:
        return wrap_and_keep()
    except VersionRetired:
        return wrap_and_keep()


def _bind(**values: object) -> dict[str, object]:
    """What SQLite stores: an id as its 16 bytes, be it asyncpg's own kind of UUID."""
    return {name: value.bytes if isinstance(value, UUID) else value for name, value in values.items()}


def _identity(connection: sqlite3.Connection) -> UUID:
    if not connection.execute(_SQL["select_identity"]).fetchone():
        with connection:
            connection.execute(_SQL["insert_identity"], _bind(store_id=uuid4()))
    return UUID(bytes=connection.execute(_SQL["select_identity"]).fetchone()[0])


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_TRIGGER:
            raise VersionRetired from error
        raise RecordsUnavailable("The key-encryption key has wrapped its share: rotate it") from error
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
        raise RecordsUnavailable("The key store cannot be reached; nothing was stored, try again") from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError("The key store is damaged") from error

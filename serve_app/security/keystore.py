"""The wrapped data keys, in a SQLite file apart from the clinical database.

Key first, then ciphertext: a key is on disk before the caller has it, so that no stored
image can be without its key. No backup of the clinical database holds a key, so that
shredding one here makes its image unreadable there, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
import sqlite3
from threading import Lock
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from serve_app.domain.errors import Erased, IntegrityError, RecordsUnavailable
from serve_app.security.envelope import DataKey, ImageBinding, data_key_id_of, open_sealed
from serve_app.security.key_checks import KeyChecks
from serve_app.security.keyring import KeyProvider, WrappedKey
from serve_app.security.private_files import locked_folder, touch_private

#: Half of what NIST SP 800-38D (8.3) allows; open_store.sql has the check.
MAX_WRAPS = 2**31

_BUSY_TIMEOUT_S = 5.0

_QUERIES = {path.stem: path.read_text() for path in (Path(__file__).parent / "queries").glob("*.sql")}


@dataclass(frozen=True, slots=True)
class KeyVersionCount:
    """One KEK version: its wraps so far (at most MAX_WRAPS), and the data keys that it wraps now."""

    key_version: int
    wraps: int
    data_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DestroyedKey:
    """A data key that was destroyed with its image: which erasure did so, why and for whom."""

    data_key_id: UUID
    receipt_id: UUID
    reason: str
    actor: str


class KeyStore:
    """Makes, finds and shreds data keys; for many threads, and many processes on one file.

    Every call blocks on the disk: from a coroutine, use `asyncio.to_thread`. One connection
    a process, used in turn: a commit waits for the disk, not for its neighbours.
    RecordsUnavailable when the file cannot be reached or written, IntegrityError when it is
    damaged, open to other users, or another keyring's (`key_checks`).
    """

    def __init__(self, path: Path, provider: KeyProvider) -> None:
        self._provider = provider
        self._checks = KeyChecks(provider, self._transaction)
        self._turn = Lock()
        with ExitStack() as on_failure, _sqlite_errors():
            with locked_folder(path.parent):
                touch_private(path)
                self._connection = sqlite3.connect(
                    path, timeout=_BUSY_TIMEOUT_S, isolation_level="IMMEDIATE", check_same_thread=False
                )
                on_failure.callback(self._connection.close)
                self._connection.executescript(_QUERIES["open_store"])
            # A lost or replaced keyring shows at start, not at the first download.
            self._checks.verify()
            on_failure.pop_all()

    def create(self) -> DataKey:
        """Make a data key that seals one image; it is on disk when this returns.

        RecordsUnavailable, too, when the current key-encryption key has wrapped its share;
        KeyProviderUnavailable while the provider's keys are not this store's.
        """
        data_key_id, material = uuid4(), AESGCM.generate_key(256)
        wrapped_key = self._checks.wrap(material, data_key_id)
        row = {
            "data_key_id": data_key_id.bytes,
            "wrapped": wrapped_key.wrapped,
            "key_version": wrapped_key.key_version,
        }
        with self._transaction() as connection:
            connection.execute(_QUERIES["count_wrap"], row)
            connection.execute(_QUERIES["insert_data_key"], row)
            connection.execute(_QUERIES["insert_awaited_key"], row)
        return DataKey(data_key_id, material, spent=False)

    def load(self, data_key_id: UUID) -> DataKey:
        """Find the key of a sealed image; it opens only.

        Erased when it was destroyed with its image, IntegrityError when there never was one or it is lost.
        """
        row = {"data_key_id": data_key_id.bytes}
        with self._transaction() as connection:
            found = connection.execute(_QUERIES["select_data_key"], row).fetchone()
            destroyed = not found and connection.execute(_QUERIES["select_destroyed_key"], row).fetchone()
        if destroyed:
            raise Erased
        if not found:
            raise IntegrityError(f"There is no data key {data_key_id}")
        return DataKey(data_key_id, self._provider.unwrap(WrappedKey(*found), data_key_id), spent=True)

    def open_image(self, sealed: bytes, binding: ImageBinding) -> bytes:
        """Decrypt a sealed image with its key. Erased as `load`; IntegrityError when altered or bound to another."""
        return open_sealed(sealed, data_key=self.load(data_key_id_of(sealed)), binding=binding)

    def rewrap(self, limit: int = 100) -> int:
        """Wrap up to `limit` data keys anew that an older KEK wrapped; returns how many were found.

        0 when all are under the current KEK. Stopped at any moment, it goes on where it was; images
        are opened meanwhile as ever. RecordsUnavailable as `create`.
        """
        current = self._checks.keys().current_version
        with self._transaction() as connection:
            stale = connection.execute(
                _QUERIES["select_stale"], {"current": current, "limit": limit}
            ).fetchall()
        # Unwrapping and wrapping may ask a service: nobody's transaction waits for that.
        rows = [self._rewrapped(UUID(bytes=row[0]), WrappedKey(*row[1:])) for row in stale]
        with self._transaction() as connection:
            connection.executemany(_QUERIES["count_wrap"], rows)
            connection.executemany(_QUERIES["replace_wrapped"], rows)
        return len(rows)

    def _rewrapped(self, data_key_id: UUID, old: WrappedKey) -> dict[str, object]:
        new = self._checks.wrap(self._provider.unwrap(old, data_key_id), data_key_id)
        return {
            "data_key_id": data_key_id.bytes,
            "wrapped": new.wrapped,
            "key_version": new.key_version,
            "old_version": old.key_version,
        }

    def verify_keys(self) -> None:
        """See that the provider's keys are this store's, and remember a version made since. IntegrityError when not."""
        self._checks.verify()

    def count_versions(self) -> list[KeyVersionCount]:
        """Say of every KEK version how many data keys it wraps, and how often it has wrapped."""
        with self._transaction() as connection:
            return [KeyVersionCount(*row) for row in connection.execute(_QUERIES["count_versions"])]

    def shred(self, *data_key_ids: UUID) -> None:
        """Destroy keys for good: on return no file of this store holds them. Safe to repeat.

        RecordsUnavailable when they may linger in the write-ahead log: then repeat.
        """
        with self._transaction() as connection:
            rows = [{"data_key_id": data_key_id.bytes} for data_key_id in data_key_ids]
            connection.executemany(_QUERIES["delete_data_key"], rows)
        self._empty_log()

    def destroy(self, key: DestroyedKey) -> None:
        """Shred the key of an erased image and remember that it was; safe to repeat. RecordsUnavailable as `shred`."""
        row = {
            "data_key_id": key.data_key_id.bytes,
            "receipt_id": key.receipt_id.bytes,
            "reason": key.reason,
            "actor": key.actor,
        }
        with self._transaction() as connection:
            connection.execute(_QUERIES["delete_data_key"], row)
            connection.execute(_QUERIES["insert_destroyed_key"], row)
        self._empty_log()

    def list_destroyed(self, *, after: int = 0, limit: int = 1000) -> list[tuple[int, DestroyedKey]]:
        """List keys that were destroyed with their images, each behind its sequence number, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(
                _QUERIES["select_destroyed_keys"], {"after": after, "limit": limit}
            ).fetchall()
        return [
            (
                sequence,
                DestroyedKey(
                    data_key_id=UUID(bytes=key), receipt_id=UUID(bytes=receipt), reason=reason, actor=actor
                ),
            )
            for sequence, key, receipt, reason, actor in rows
        ]

    def list_made_before(
        self, age_s: int, *, after: int = 0, limit: int = 1000
    ) -> list[tuple[int, UUID, bool]]:
        """List data keys of at least this age in seconds, oldest first.

        Each is behind its sequence number, and before whether its image is still awaited.
        """
        row = {"age": f"-{age_s} seconds", "after": after, "limit": limit}
        with self._transaction() as connection:
            rows = connection.execute(_QUERIES["select_old_keys"], row).fetchall()
        return [(sequence, UUID(bytes=key), bool(awaited)) for sequence, key, awaited in rows]

    def list_awaited(self, *, after: UUID | None = None, limit: int = 1000) -> list[UUID]:
        """List data keys whose image was not seen in the database yet, by id, from behind `after` on."""
        row = {"after": after.bytes if after else b"", "limit": limit}
        with self._transaction() as connection:
            return [UUID(bytes=key) for (key,) in connection.execute(_QUERIES["select_awaited_keys"], row)]

    def stop_awaiting(self, data_key_ids: Iterable[UUID]) -> None:
        """Remember that the images of these keys are in the database: from now on such a key is no failed upload's."""
        rows = [{"data_key_id": data_key_id.bytes} for data_key_id in data_key_ids]
        with self._transaction() as connection:
            connection.executemany(_QUERIES["delete_awaited_key"], rows)

    def _empty_log(self) -> None:
        with self._transaction() as connection:
            lingers, _, _ = connection.execute(_QUERIES["empty_log"]).fetchone()
        if lingers:
            raise RecordsUnavailable("The key is deleted but not yet overwritten; try again")

    def close(self) -> None:
        """Let go of the file; the store is of no use after."""
        with self._turn:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _sqlite_errors(), self._turn, self._connection as connection:
            yield connection


def is_used(path: Path) -> bool:
    """Whether the key store at `path` has a data key, or knows of one destroyed; False where there is no store.

    RecordsUnavailable and IntegrityError as `KeyStore`.
    """
    if not path.exists():
        return False
    with _sqlite_errors(), closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)) as connection:
        connection.executescript(_QUERIES["open_store"])
        return bool(connection.execute(_QUERIES["select_whether_used"]).fetchone()[0])


@contextmanager
def _sqlite_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise RecordsUnavailable("The key-encryption key has wrapped its share: rotate it") from error
    except (sqlite3.OperationalError, sqlite3.ProgrammingError, OSError) as error:
        raise RecordsUnavailable("The key store cannot be reached; nothing was stored, try again") from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError("The key store is damaged") from error

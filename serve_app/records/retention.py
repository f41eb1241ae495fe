"""How long what is stored is kept: images past their time, idempotency keys and data keys left over, and lost keys.

Nothing expires by itself. Once the hospital closes a record, the retention period runs from there, or from
a later image; a legal hold keeps an image beyond it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from uuid import UUID

from serve_app.audit.events import account_event
from serve_app.audit.rows import CLOSED_RECORDS, vouch
from serve_app.domain.errors import Conflict, IntegrityError
from serve_app.keys.keystore import KeyStore, look_into
from serve_app.records.audit_log import record_event
from serve_app.records.pool import Pool, Store, queries

_SQL = queries("retention")


@dataclass(frozen=True, slots=True)
class RetentionCount:
    """How many records are closed, how many images are past their retention, and how many of these are held."""

    closed: int
    expired: int
    held: int


class RetentionStore(Store):
    """Closes records, and finds what is past its retention."""

    async def close(self, patient_id: str, *, closed_at: datetime, actor: str) -> None:
        """Close a patient's record as of then, on record; needs the owner's role. Conflict when it is closed."""
        await self._change("close", patient_id, actor, "Its record is closed already.", closed_at, actor)

    async def reopen(self, patient_id: str, *, actor: str) -> None:
        """Open a record again, on record; needs the owner's role. Conflict when it is not closed."""
        await self._change("reopen", patient_id, actor, "Its record is not closed.")

    async def expired(self, *, days: int, limit: int) -> list[tuple[UUID, UUID]]:
        """List (lesion, image) past this many days of retention that no hold keeps, longest past first."""
        rows = await self._pool.fetch(_SQL["expired"], timedelta(days=days), limit)
        return [(row["lesion_id"], row["image_id"]) for row in rows]

    async def count(self, *, days: int) -> RetentionCount:
        """Count what a retention of this many days would erase, and what a hold keeps."""
        (counted,) = await self._pool.find_all(RetentionCount, _SQL["count"], timedelta(days=days))
        return counted

    async def _change(self, change: str, patient_id: str, actor: str, refusal: str, *values: object) -> None:
        async with self._pool.connection() as connection, connection.transaction():
            rows = await connection.fetch(_SQL[change], patient_id, *values)
            if not rows:
                raise Conflict(refusal)
            event = account_event(f"record_{change}", actor=actor, patient_id=patient_id)
            await record_event(connection, vouch(event, CLOSED_RECORDS, rows))


_HOUSEKEEPING_SQL = queries("housekeeping")


class Housekeeping(Store):
    """Finds what can go, and lets go of it. For any number at once."""

    async def expire_idempotency_keys(self, *, days: int) -> int:
        """Delete idempotency keys of this age, which no caller repeats any more, but for pending assessments'."""
        expired, query = 0, _HOUSEKEEPING_SQL["expire_idempotency_keys"]
        while found := await self._pool.fetch(query, timedelta(days=days), 1000):
            expired += len(found)
        return expired

    async def orphaned(self, data_key_ids: Sequence[UUID]) -> list[UUID]:
        """Say which of these data keys have no image now; one may still be on its way."""
        rows = await self._pool.fetch(_HOUSEKEEPING_SQL["orphaned"], data_key_ids)
        return [row["data_key_id"] for row in rows]

    async def condemn(self, data_key_ids: Sequence[UUID]) -> list[UUID]:
        """Have no image come in any more for those of these keys that have none; returns them, to be shredded.

        However late an upload is, whichever of the two commits first is seen by the other one: an image
        that is in keeps its key, and an image of a condemned key is refused (RecordsUnavailable to its caller).
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_HOUSEKEEPING_SQL["let_no_image_in"])
            rows = await connection.fetch(_HOUSEKEEPING_SQL["orphaned"], data_key_ids)
            orphaned = [row["data_key_id"] for row in rows]
            await connection.execute(_HOUSEKEEPING_SQL["condemn"], orphaned)
            return orphaned


_LOST_KEYS_SQL = queries("lost_keys")

#: So many of the oldest images and of the newest are looked for. After the restore of an older key store the newest
#: have lost their keys, and the oldest have not.
_SAMPLE = 100


async def refuse_lost_keys(pool: Pool, keystore: Path) -> None:
    """IntegrityError when the key store is not this database's: lost, empty, or another node's.

    To be asked before a key store or a keyring is made: an empty one in a lost one's place would
    have uploads go on, and every older image unreadable without anybody being told.
    """
    # In this order: a key comes before its image, so that a first upload meanwhile is not taken for a loss.
    has = {
        table: await pool.fetchval(_LOST_KEYS_SQL["has_table"], table)
        for table in ("key_stores", "lesion_images")
    }
    owner = await pool.fetchval(_LOST_KEYS_SQL["key_store"]) if has["key_stores"] else None
    images = await pool.fetch(_LOST_KEYS_SQL["sealed_images"], _SAMPLE) if has["lesion_images"] else []
    found = await asyncio.to_thread(look_into, keystore, [image["data_key_id"] for image in images])
    if images and not (found and found[1]):
        raise IntegrityError(
            f"The database has sealed images, and the key store {keystore} is gone or knows no key of theirs: "
            "none of them opens. Put its backup back with `derm-cds restore --keys FOLDER` (and keyring.json, if "
            "that is gone, too). Without a backup these images are lost: start with a database of its own."
        )
    _refuse_another(owner, found[0] if found else None, keystore)


async def claim_key_store(pool: Pool, keys: KeyStore, path: Path) -> None:
    """Bind a database to its key store, at the first start with it; IntegrityError when another one was first."""
    await pool.execute(_LOST_KEYS_SQL["claim"], keys.store_id)
    _refuse_another(await pool.fetchval(_LOST_KEYS_SQL["key_store"]), keys.store_id, path)


def _refuse_another(owner: UUID | None, mine: UUID | None, path: Path) -> None:
    if owner is not None and owner != mine:
        raise IntegrityError(
            f"The database belongs to another key store than {path}: two nodes with keys of their own cannot share "
            "a database. Put that key store back (its backup: `derm-cds restore --keys FOLDER`), or start with a "
            "database of its own."
        )

"""Whether a key store is the one that the images on record were sealed with: not lost, and not another node's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

from serve_app.domain.errors import IntegrityError
from serve_app.records.pool import Pool
from serve_app.records.sql import queries
from serve_app.security.keystore import KeyStore, look_into

_SQL = queries("lost_keys")

#: So many of the oldest images and of the newest are looked for. After the restore of an older key store the newest
#: have lost their keys, and the oldest have not.
_SAMPLE = 100


async def refuse_lost_keys(pool: Pool, keystore: Path) -> None:
    """IntegrityError when the key store is not this database's: lost, empty, or another node's.

    To be asked before a key store or a keyring is made: an empty one in a lost one's place would
    have uploads go on, and every older image unreadable without anybody being told.
    """
    # In this order: a key comes before its image, so that a first upload meanwhile is not taken for a loss.
    has = {table: await pool.fetchval(_SQL["has_table"], table) for table in ("key_stores", "lesion_images")}
    owner = await pool.fetchval(_SQL["key_store"]) if has["key_stores"] else None
    images = await pool.fetch(_SQL["sealed_images"], _SAMPLE) if has["lesion_images"] else []
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
    await pool.execute(_SQL["claim"], keys.store_id)
    _refuse_another(await pool.fetchval(_SQL["key_store"]), keys.store_id, path)


def _refuse_another(owner: UUID | None, mine: UUID | None, path: Path) -> None:
    if owner is not None and owner != mine:
        raise IntegrityError(
            f"The database belongs to another key store than {path}: two nodes with keys of their own cannot share "
            "a database. Put that key store back (its backup: `derm-cds restore --keys FOLDER`), or start with a "
            "database of its own."
        )

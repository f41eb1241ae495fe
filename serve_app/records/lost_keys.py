"""Whether the keys of the images on record are lost as a whole: a key store that is empty, or not there."""

from __future__ import annotations

import asyncio
from pathlib import Path

from serve_app.domain.errors import IntegrityError
from serve_app.records.pool import Pool
from serve_app.records.sql import queries
from serve_app.security.keystore import is_used

_SQL = queries("lost_keys")


async def refuse_lost_keys(pool: Pool, keystore: Path) -> None:
    """IntegrityError when the database has sealed images and the key store beside it never had a key.

    To be asked before a key store or a keyring is made: an empty one in a lost one's place would
    have uploads go on, and every older image unreadable without anybody being told.
    """
    # In this order: a key comes before its image, so that a first upload meanwhile is not taken for a loss.
    holds_images = await pool.fetchval(_SQL["has_images"]) and await pool.fetchval(_SQL["has_sealed_images"])
    if holds_images and not await asyncio.to_thread(is_used, keystore):
        raise IntegrityError(
            f"The database has sealed images, and the key store {keystore} is empty or gone: none of them opens. "
            "Put its backup back with `derm-cds restore --keys FOLDER` (and keyring.json, if that is gone, too). "
            "Without a backup these images are lost: start with a database of its own."
        )

"""Sweeping data keys whose image never came: the upload failed or the process died between key and image."""

from __future__ import annotations

import asyncio
import logging

from serve_app.records.housekeeping import Housekeeping
from serve_app.security.keystore import KeyStore

#: Far longer than an upload lasts. Only courtesy: an upload that is slower still is refused, and loses nothing.
ORPHANED_AFTER_S = 3600
#: More at once do not come from failed uploads, but from a database that is older than the key store.
AT_MOST = 100

logger = logging.getLogger("derm.keys")


async def sweep_orphaned_keys(
    housekeeping: Housekeeping, keys: KeyStore, *, age_s: int = ORPHANED_AFTER_S, at_most: int = AT_MOST
) -> int:
    """Shred data keys of this age that have no image; returns how many.

    More than `at_most` are all left alone: they are of images that an older, restored database does not have,
    and that would be lost for good, should the newer one be put back. A key is only shredded once no image
    can come in for it.
    """
    orphaned, after = [], 0
    while page := await asyncio.to_thread(keys.list_made_before, age_s, after=after):
        after = page[-1][0]
        orphaned += await housekeeping.orphaned([key for _, key in page])
    if len(orphaned) > at_most:
        logger.error(
            "%d data keys have no image: was an older database restored? None is swept", len(orphaned)
        )
        return 0
    condemned = await housekeeping.condemn(orphaned) if orphaned else []
    if condemned:
        await asyncio.to_thread(keys.shred, *condemned)
        logger.warning("Swept %d data keys whose image never came", len(condemned))
    return len(condemned)

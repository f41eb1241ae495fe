"""What is done in the background beside answering: accepted erasures finished, and what is left over let go."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
import logging
from pathlib import Path
from uuid import UUID

from serve_app.domain.errors import DataKeyMissing, LegalHold
from serve_app.erasure.eraser import Eraser
from serve_app.keys.keystore import KeyStore
from serve_app.keys.receipts import ErasureReason
from serve_app.private_files import locked_folder, read_private, write_private
from serve_app.records.erasures import ErasureRequest
from serve_app.records.retention import Housekeeping, RetentionStore

#: How often accepted erasures and new images' keys are looked after, and everything else.
ERASURES_EVERY_S, REST_EVERY_S = 10.0, 3600.0
#: Far longer than an upload lasts. Only courtesy: an upload that is slower still is refused, and loses nothing.
ORPHANED_AFTER_S = 3600
#: From so many lost images on the database is not trusted in what it says of failed uploads either.
#: Fewer may be failed uploads of a version that did not tell the two apart.
MAX_LOST = 100

#: No image comes in while a batch is condemned: so a batch is short.
_BATCH = 100

logger = logging.getLogger("derm.keys")


@dataclass(frozen=True, slots=True)
class OrphanedKeys:
    """Data keys without an image: whose upload failed, and whose image was in the database once (or may have been)."""

    failed: Sequence[UUID]
    lost: Sequence[UUID]


def pause(file: Path, reason: str) -> None:
    """Have this node erase nothing by its age, and sweep no key, until an operator says so."""
    with locked_folder(file.parent):
        write_private(file, f"since {datetime.now(UTC).isoformat(timespec='seconds')}: {reason}\n".encode())


def read_pause(file: Path) -> str | None:
    """Since when and why it is so; None when it is not."""
    return read_private(file).decode(errors="replace").strip() if file.exists() else None


async def stop_awaiting_stored(housekeeping: Housekeeping, keys: KeyStore) -> int:
    """Have the key store remember which images are in; returns how many. Often: what is not yet seen is not protected."""
    seen, after = 0, None
    while page := await asyncio.to_thread(keys.list_awaited, after=after):
        after = page[-1]
        orphaned = set(await housekeeping.orphaned(page))
        stored = [key for key in page if key not in orphaned]
        if stored:
            await asyncio.to_thread(keys.stop_awaiting, stored)
            seen += len(stored)
    return seen


async def find_orphaned_keys(
    housekeeping: Housekeeping, keys: KeyStore, *, age_s: int = ORPHANED_AFTER_S
) -> OrphanedKeys:
    """Find the data keys of this age that have no image."""
    failed: list[UUID] = []
    lost: list[UUID] = []
    after = 0
    while page := await asyncio.to_thread(keys.list_made_before, age_s, after=after):
        after = page[-1][0]
        awaited = {key: is_awaited for _, key, is_awaited in page}
        for key in await housekeeping.orphaned(list(awaited)):
            (failed if awaited[key] else lost).append(key)
    return OrphanedKeys(failed, lost)


async def shred_orphaned_keys(housekeeping: Housekeeping, keys: KeyStore, orphaned: Sequence[UUID]) -> int:
    """Shred these keys but for those whose image has come meanwhile; returns how many.

    A key is only shredded once no image can come in for it.
    """
    shredded = 0
    for start in range(0, len(orphaned), _BATCH):
        condemned = await housekeeping.condemn(orphaned[start : start + _BATCH])
        if condemned:
            await asyncio.to_thread(keys.shred, *condemned)
            shredded += len(condemned)
    return shredded


async def sweep_orphaned_keys(
    housekeeping: Housekeeping, keys: KeyStore, *, age_s: int = ORPHANED_AFTER_S, max_lost: int = MAX_LOST
) -> int:
    """Shred data keys of this age whose upload failed; returns how many.

    Those of lost images are left alone, and with more than `max_lost` of them all others, too.
    """
    await stop_awaiting_stored(housekeeping, keys)
    orphaned = await find_orphaned_keys(housekeeping, keys, age_s=age_s)
    if orphaned.lost:
        logger.error(
            "%d data keys have lost their image: was an older database restored? They are kept: "
            "put the newer database back, or give them up with `derm-cds keys sweep`",
            len(orphaned.lost),
        )
    if len(orphaned.lost) > max_lost:
        return 0
    swept = await shred_orphaned_keys(housekeeping, keys, orphaned.failed)
    if swept:
        logger.warning("Swept %d data keys whose image never came", swept)
    return swept


async def erase_expired(retention: RetentionStore, eraser: Eraser, *, days: int, actor: str) -> int:
    """Erase every image past this many days of retention that no hold keeps; returns how many were.

    Stopped at any moment, it goes on where it was.
    """
    erased = 0
    while images := await retention.expired(days=days, limit=_BATCH):
        before = erased
        for lesion_id, image_id in images:
            request = ErasureRequest(
                lesion_id=lesion_id, image_id=image_id, reason=ErasureReason.RETENTION, actor=actor
            )
            try:
                await eraser.erase(request)
            except (LegalHold, DataKeyMissing):  # held since it was listed; a key to be destroyed elsewhere
                continue
            erased += 1
        if erased == before:
            break
    return erased

"""Erasing what is past its retention, the very way a caller's request erases."""

from __future__ import annotations

from uuid import uuid4

from serve_app.api.eraser import Eraser
from serve_app.domain.errors import DataKeyMissing, LegalHold
from serve_app.records.erasures import ErasureRequest
from serve_app.records.retention import RetentionStore
from serve_app.security.receipts import ErasureReason

_BATCH = 100


async def erase_expired(retention: RetentionStore, eraser: Eraser, *, days: int, actor: str) -> int:
    """Erase every image past this many days of retention that no hold keeps; returns how many were.

    Stopped at any moment, it goes on where it was.
    """
    erased = 0
    while images := await retention.expired(days=days, limit=_BATCH):
        before = erased
        for lesion_id, image_id in images:
            request = ErasureRequest(
                lesion_id=lesion_id,
                image_id=image_id,
                reason=ErasureReason.RETENTION,
                actor=actor,
                request_id=str(uuid4()),
            )
            try:
                await eraser.erase(request)
            except (
                LegalHold,
                DataKeyMissing,
            ):  # a hold set since the list was made; a key to be destroyed elsewhere
                continue
            erased += 1
        if erased == before:
            break
    return erased

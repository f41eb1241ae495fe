"""The use case: an image destroyed for good, and the receipt that proves it.

In this order, so that a crash at any point leaves an erasure that is either not accepted or will be finished:

1. accept: one transaction of the database destroys ciphertext, vectors and findings, and is the promise;
2. destroy: the key store overwrites the wrapped data key and remembers that it did;
3. prove: one more transaction adds the receipt.

The promise goes first. With the key first, a crash would leave an image that does not open, and nothing that
says who wanted that.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
import logging
from uuid import UUID

from serve_app.domain.errors import DataKeyMissing, DermError, LegalHold, NotFound
from serve_app.domain.identifiers import new_id
from serve_app.keys.keystore import DestroyedKey, KeyStore
from serve_app.keys.receipts import ErasureReason, Receipt
from serve_app.records.erasures import Erasure, ErasureRequest, ErasureStore, Verdict

logger = logging.getLogger("derm.erasure")

#: Until then an erasure is its caller's to finish, seconds: longer than a request waits for the key store.
ABANDONED_AFTER_S = 15.0


@dataclass(frozen=True, slots=True)
class Eraser:
    """Erases images, and finishes what was accepted and not proven.

    `tells_pms`: an erasure for an encounter goes into the outbox, in the receipt's own transaction; `tells_fhir`: so
    does the lesion's report as it is then.
    """

    erasures: ErasureStore
    keys: KeyStore
    tells_pms: bool = False
    tells_fhir: bool = False

    async def erase(self, request: ErasureRequest) -> tuple[Erasure, bool]:
        """Erase an image; returns the erasure, and whether it is this request's or an earlier one's.

        The erasure has no receipt when the key store could not be reached: it is accepted, and is finished
        as soon as that answers. DataKeyMissing when this node's key store does not hold the key: accepted as
        well, and finished where the key is. Raises LegalHold, NotFound and RecordsUnavailable with nothing changed.
        """
        verdict = await self.erasures.accept(request)
        if verdict is Verdict.HELD:
            raise LegalHold
        erasure = await self.erasures.find(request.lesion_id, request.image_id)
        if verdict is Verdict.ABSENT or erasure is None:
            raise NotFound
        if erasure.receipt is None:
            try:
                await self._finish(erasure)
            except DataKeyMissing:
                raise DataKeyMissing(
                    "The erasure is accepted, and this node's key store does not hold the image's data key: "
                    "the receipt follows once the key store that holds it has destroyed it."
                ) from None
            except DermError as error:
                logger.warning("Erasure %s waits: %s", erasure.receipt_id, type(error).__name__)
            else:
                erasure = await self.find(request.lesion_id, request.image_id)
        return erasure, verdict is Verdict.ACCEPTED

    async def finish_accepted(self, *, older_than_s: float = ABANDONED_AFTER_S, limit: int = 100) -> int:
        """Finish what a crash or an unreachable key store left; returns how many receipts were added.

        What this node's key store does not hold the key of holds up no other; it stays to be done.
        """
        finished, missing, after = 0, 0, UUID(int=0)
        while page := await self.erasures.unproven(older_than_s=older_than_s, limit=limit, after=after):
            after = page[-1][0]
            for _, lesion_id, image_id in page:
                erasure = await self.erasures.find(lesion_id, image_id)
                if erasure is not None and erasure.receipt is None:
                    try:
                        await self._finish(erasure)
                    except DataKeyMissing:
                        missing += 1
                    else:
                        finished += 1
        if missing:
            logger.error("%d erasures are accepted, and this node does not hold the data keys", missing)
        return finished

    async def erase_restored(self) -> int:
        """Erase again what a restored database has brought back: its keys are gone; returns how many.

        A restored backup holds no image that opens, and yet vectors and findings of those erased after it. The
        key store, which was not restored with it, remembers; each gets its old receipt's id, reason and actor.
        """
        erased, after = 0, 0
        while page := await asyncio.to_thread(self.keys.list_destroyed, after=after):
            after = page[-1][0]
            back = await self.erasures.restored([key.data_key_id for _, key in page])
            for _, key in page:
                if key.data_key_id in back:
                    erased += await self._erase_again(key, *back[key.data_key_id])
        if erased:
            logger.warning("Erased %d images again that a restored database had brought back", erased)
        return erased

    async def _erase_again(self, key: DestroyedKey, lesion_id: UUID, image_id: UUID) -> bool:
        request = ErasureRequest(
            lesion_id=lesion_id,
            image_id=image_id,
            reason=ErasureReason(key.reason),
            actor=key.actor,
            receipt_id=key.receipt_id,
        )
        try:
            await self.erase(request)
        except LegalHold:  # what it is to keep is lost already, but that is not for us to decide
            return False
        return True

    async def find(self, lesion_id: UUID, image_id: UUID) -> Erasure:
        """Find an image's erasure; NotFound when it was never erased, IntegrityError for a changed receipt."""
        erasure = await self.erasures.find(lesion_id, image_id)
        if erasure is None:
            raise NotFound("This image was not erased.")
        return erasure

    async def _finish(self, erasure: Erasure) -> Receipt:
        """Destroy the key, then say so. Any number may do this at once: each step is safe to repeat."""
        key = DestroyedKey(erasure.data_key_id, erasure.receipt_id, erasure.reason, erasure.actor)
        await asyncio.to_thread(self.keys.destroy, key)
        message_id = new_id() if self.tells_pms else None
        return await self.erasures.prove(erasure, message_id=message_id, fhir=self.tells_fhir)

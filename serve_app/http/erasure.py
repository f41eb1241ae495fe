"""DELETE of an image, and its receipt."""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from serve_app.access.rules import Action
from serve_app.domain.assessment import format_time
from serve_app.http.access import Caller, permit_lesion, rule
from serve_app.http.bodies import Form, body_of, read_form
from serve_app.http.documents import NO_STORE, PROBLEM_RESPONSES, ErasureDocument
from serve_app.http.services import Parts
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import Erasure, ErasureRequest

router = APIRouter(tags=["erasure"], responses=PROBLEM_RESPONSES)

#: Seconds until an accepted erasure is worth asking for again: housekeeping's own rhythm.
_RETRY_AFTER = "10"


class ErasureForm(Form):
    """Why an image is to be erased; the note is kept with the erasure and never logged: no names in it."""

    reason: Literal["patient_request", "consent_withdrawn", "wrong_patient", "uploaded_in_error"]
    # NUL and lone surrogates are not text to PostgreSQL.
    note: str | None = Field(default=None, min_length=1, max_length=500, pattern=r"^[^\x00-\x08\x0e-\x1f]*$")


@router.delete(
    "/api/lesions/{lesion_id}/images/{image_id}",
    response_model=ErasureDocument,
    responses={202: {"model": ErasureDocument}},
    openapi_extra=rule(Action.ERASE, requestBody=body_of(ErasureForm)),
    summary="Erase an image for good",
)
async def erase_image(
    request: Request, requested: Caller, services: Parts, lesion_id: UUID, image_id: UUID
) -> JSONResponse:
    """Destroy key, ciphertext, vectors and findings; 200 with the receipt, the same one for every repetition.

    202: it is accepted and can no longer be undone, and the receipt follows; so does 503 `data_key_missing`, where
    this node does not hold the image's data key.
    """
    await permit_lesion(services, requested, lesion_id)
    form = await read_form(request, ErasureForm)
    requested.image_id = image_id
    erasure, accepted = await services.eraser.erase(
        ErasureRequest(
            lesion_id=lesion_id,
            image_id=image_id,
            reason=ErasureReason(form.reason),
            note=form.note,
            actor=requested.actor,
            request_id=requested.request_id,
        )
    )
    if not accepted:  # this request changed nothing, and is on record, too
        await services.records.record_event(requested.event("success", receipt_id=str(erasure.receipt_id)))
    return _answer(erasure)


@router.get(
    "/api/lesions/{lesion_id}/images/{image_id}/receipt",
    response_model=ErasureDocument,
    responses={202: {"model": ErasureDocument}},
    openapi_extra=rule(Action.READ_RECEIPT),
    summary="The receipt of an erased image",
)
async def read_receipt(requested: Caller, services: Parts, lesion_id: UUID, image_id: UUID) -> JSONResponse:
    """Answer with the receipt; 202 while the erasure is accepted and its key not yet known to be gone."""
    await permit_lesion(services, requested, lesion_id)
    requested.image_id = image_id
    erasure = await services.eraser.find(lesion_id, image_id)
    await services.records.record_event(requested.event("success", receipt_id=str(erasure.receipt_id)))
    return _answer(erasure)


def _answer(erasure: Erasure) -> JSONResponse:
    receipt = erasure.receipt
    answer = {
        "receipt_id": str(erasure.receipt_id),
        "image_id": str(erasure.image_id),
        "erased_at": format_time(receipt.erased_at, "microseconds") if receipt else None,
        "actor": erasure.actor,
        "reason": erasure.reason,
        "ciphertext_sha256": erasure.ciphertext_sha256.hex(),
        "data_key_id": str(erasure.data_key_id),
        "record_hash": receipt.record_hash.hex() if receipt else None,
    }
    if receipt is None:
        return JSONResponse(answer, 202, NO_STORE | {"Retry-After": _RETRY_AFTER})
    return JSONResponse(answer, 200, NO_STORE)

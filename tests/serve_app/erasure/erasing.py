"""An image and its answer, what is on record of them, changes behind the service's back, and what ends them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx

from serve_app.keys.receipts import ErasureReason
from serve_app.lesions.recovery import recover_once
from serve_app.records.erasures import ErasureRequest


async def uploaded(service, **fields: str) -> dict[str, Any]:
    """One image with its answer."""
    response = await service.upload(await service.care(), **fields)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def followed(service, first: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """The answer to a later image of the same lesion."""
    response = await service.upload(first["patient_id"], lesion_id=first["lesion_id"], **fields)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


def path(answer: dict[str, Any]) -> str:
    """Where the image is."""
    return f"/api/lesions/{answer['lesion_id']}/images/{answer['image_id']}"


async def erase(service, answer: dict[str, Any], **body: object) -> httpx.Response:
    """Have a supervisor erase it."""
    return await service.client.request(
        "DELETE",
        path(answer),
        json={"reason": "patient_request", **body},
        headers=service.token("chief", ("supervisor",)),
    )


def request_of(answer: dict[str, Any]) -> ErasureRequest:
    """A request as the eraser gets it, of a process that will crash."""
    return ErasureRequest(
        lesion_id=UUID(answer["lesion_id"]),
        image_id=UUID(answer["image_id"]),
        reason=ErasureReason.WRONG_PATIENT,
        actor="chief",
        request_id="crashed",
    )


async def row(service, answer: dict[str, Any]) -> Any:
    """What the database has of the image."""
    return await service.owner.fetchrow(
        "SELECT i.*, a.outcome, a.failure, a.attempts, a.answer, a.context,"
        " (SELECT count(*) FROM lesion_embeddings AS e WHERE e.image_id = i.image_id) AS vectors"
        " FROM lesion_images AS i JOIN assessments AS a USING (image_id) WHERE image_id = $1::text::uuid",
        answer["image_id"],
    )


async def change(service, answer: dict[str, Any], table: str, assignments: str, *values: object) -> None:
    """Change the image's row of a table behind the service's back; `$2` and on are the values."""
    await service.owner.execute(
        f"UPDATE {table} SET {assignments} WHERE image_id = $1::text::uuid",  # noqa: S608 - the tests' own words
        answer["image_id"],
        *values,
    )


async def damage(service, answer: dict[str, Any]) -> None:
    """Flip a bit of the sealed image."""
    flipped = "sealed = set_byte(sealed, 100, get_byte(sealed, 100) # 1)"
    await change(service, answer, "lesion_images", flipped)


async def end_leases(service) -> None:
    """Whatever is pending may be recovered by anybody."""
    await service.owner.execute("UPDATE assessments SET lease_until = NULL WHERE outcome = 'pending'")


async def recover_expired(service) -> int:
    """Recover what is pending and leased by nobody."""
    services = service.app.state.services
    return await recover_once(services.records, services.triage, services.live)


async def recover(service) -> int:
    """Recover what is pending as if every lease on it had ended."""
    await end_leases(service)
    return await recover_expired(service)

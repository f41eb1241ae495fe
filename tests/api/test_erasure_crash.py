"""An erasure that meets a crash, a key store that is away, a restored backup, an assessment still pending."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.api.recovery import FAILED_AFTER_TRIES, recover_once
from serve_app.domain.errors import Erased, RecordsUnavailable
from serve_app.records.erasures import ErasureStore, Verdict
from serve_app.security.envelope import ImageBinding
from tests.api.erasing import erase, path, request_of, row, uploaded


@pytest.fixture
async def answer(service) -> dict[str, Any]:
    return await uploaded(service)


@pytest.mark.parametrize("step", ["accepted", "destroyed"])
async def test_what_was_accepted_is_finished_after_a_crash(service, answer, step: str) -> None:
    """The process dies after the named step: what it had done is on disk, what it had not is not."""
    services = service.app.state.services
    erasures = ErasureStore(services.pool)
    request = request_of(answer)
    assert await erasures.accept(request) is Verdict.ACCEPTED
    erasure = await erasures.find(request.lesion_id, request.image_id)
    if step == "destroyed":
        services.keys.shred(erasure.data_key_id)
    reading = await service.client.get(f"{path(answer)}/receipt", headers=service.token("dr"))
    assert (reading.status_code, reading.json()["record_hash"]) == (202, None)
    assert await services.eraser.finish_accepted(older_than_s=0) >= 1
    assert await services.eraser.finish_accepted(older_than_s=0) == 0
    with pytest.raises(Erased):
        services.keys.load(erasure.data_key_id)
    read = await service.client.get(f"{path(answer)}/receipt", headers=service.token("dr"))
    assert (read.status_code, read.json()["receipt_id"]) == (200, str(erasure.receipt_id))
    events = await service.owner.fetch(
        "SELECT action FROM audit_events WHERE image_id = $1 AND request_id = 'crashed'", request.image_id
    )
    assert sorted(event["action"] for event in events) == ["erase", "erased"]


async def test_a_key_store_that_does_not_answer_is_an_erasure_accepted(service, answer, monkeypatch) -> None:
    services = service.app.state.services

    def fail(_key: object) -> None:
        raise RecordsUnavailable

    with monkeypatch.context() as patch:
        patch.setattr(services.keys, "destroy", fail)
        accepted = await erase(service, answer)
        assert accepted.status_code == 202
        assert int(accepted.headers["retry-after"]) > 0
        service.hold_to("ErasureDocument", accepted.json())
        service.hold_to_problem(
            await service.client.get(path(answer), headers=service.token("dr")), 410, "erased"
        )
    finished = await erase(service, answer)
    assert finished.status_code == 200
    assert finished.json()["receipt_id"] == accepted.json()["receipt_id"]


async def test_a_backup_from_before_opens_nothing_and_is_erased_again(service, answer) -> None:
    """The clinical rows as a restored backup would have them; the key store is the one of today."""
    services = service.app.state.services
    before = await row(service, answer)
    binding = ImageBinding(before["image_id"], before["patient_id"], before["content_type"])
    assert services.keys.open_image(before["sealed"], binding) == service.image
    receipt = (await erase(service, answer)).json()
    with pytest.raises(Erased):
        services.keys.open_image(before["sealed"], binding)
    async with service.owner.connection() as connection, connection.transaction():
        for table in ("erasures", "erasure_receipts"):
            await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        await connection.execute(
            "DELETE FROM erasure_receipts WHERE receipt_id = $1::text::uuid", receipt["receipt_id"]
        )
        await connection.execute(
            "DELETE FROM erasures WHERE receipt_id = $1::text::uuid", receipt["receipt_id"]
        )
        for table in ("erasures", "erasure_receipts"):
            await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
        await connection.execute(
            "UPDATE lesion_images SET sealed = $2, erased_at = NULL WHERE image_id = $1",
            before["image_id"],
            before["sealed"],
        )
        await connection.execute(
            "UPDATE assessments SET outcome = $2, answer = $3, context = $4 WHERE image_id = $1",
            before["image_id"],
            before["outcome"],
            before["answer"],
            before["context"],
        )
    gone = await service.client.get(path(answer), headers=service.token("dr"))
    service.hold_to_problem(gone, 410, "erased")
    assert await services.eraser.erase_restored() == 1
    assert await services.eraser.erase_restored() == 0
    again = await row(service, answer)
    assert (again["sealed"], again["answer"]) == (None, None)
    read = await service.client.get(f"{path(answer)}/receipt", headers=service.token("dr"))
    assert read.json()["receipt_id"] == receipt["receipt_id"]


async def pending(service) -> dict[str, Any]:
    """An upload whose process died after the first commit."""
    answer: dict[str, Any] = (await service.upload(await service.care())).json()
    await service.owner.execute(
        "DELETE FROM lesion_embeddings WHERE image_id = $1::text::uuid", answer["image_id"]
    )
    await service.owner.execute(
        "UPDATE assessments SET outcome = 'pending', answer = NULL, completed_at = NULL"
        " WHERE image_id = $1::text::uuid",
        answer["image_id"],
    )
    return answer


async def test_a_pending_assessment_of_an_erased_image_is_cancelled(service) -> None:
    services, answer = service.app.state.services, await pending(service)
    assert (await erase(service, answer)).status_code == 200
    assert (await row(service, answer))["outcome"] == "cancelled"
    assert await recover_once(services.records, services.triage, services.live) == 0
    after = await row(service, answer)
    assert (after["outcome"], after["vectors"]) == ("cancelled", 0)


@pytest.mark.parametrize("cause", ["image_too_small", "integrity"])
async def test_an_image_that_can_never_be_assessed_ends_as_failed_once(
    start_service, local_stages, service, cause: str
) -> None:
    answer = await pending(service)
    image = answer["image_id"]
    if cause == "integrity":
        await service.owner.execute(
            "UPDATE lesion_images SET sealed = set_byte(sealed, 100, get_byte(sealed, 100) # 1)"
            " WHERE image_id = $1::text::uuid",
            image,
        )
    async with start_service(local_stages(min_side=1000 if cause == "image_too_small" else 224)) as other:
        services = other.app.state.services
        for tried in range(FAILED_AFTER_TRIES + 2):
            found = await row(service, answer)
            assert found["outcome"] == ("pending" if tried < FAILED_AFTER_TRIES else "failed")
            await recover_once(services.records, services.triage, services.live)
            await service.owner.execute(
                "UPDATE assessments SET lease_until = NULL WHERE image_id = $1::text::uuid", image
            )
    seen = await service.client.get(f"/api/lesions/{answer['lesion_id']}", headers=service.token("dr"))
    service.hold_to("TimelineDocument", seen.json())
    (shown,) = seen.json()["assessments"]
    assert (shown["outcome"], shown["reasons"][0]["code"]) == ("failed", cause)
    events = await service.owner.fetch(
        "SELECT detail FROM audit_events WHERE action = 'classify' AND outcome = 'failed'"
        " AND image_id = $1::text::uuid",
        image,
    )
    assert [event["detail"]["code"] for event in events] == [cause]

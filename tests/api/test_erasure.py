"""An image destroyed for good: what is gone, what stays, and a crash at every step."""

from __future__ import annotations

from hashlib import sha256
import json
from typing import Any

import pytest

from serve_app.api.recovery import FAILED_AFTER_TRIES, recover_once
from serve_app.domain.errors import Erased, RecordsUnavailable
from serve_app.records.erasures import ErasureRequest, ErasureStore, Verdict
from serve_app.records.holds import Held, HoldStore
from serve_app.security.envelope import ImageBinding
from serve_app.security.receipts import ErasureReason


@pytest.fixture
async def answer(service) -> dict[str, Any]:
    response = await service.upload(await service.care())
    assert response.status_code == 201, response.text
    return response.json()


def path(answer: dict[str, Any]) -> str:
    return f"/api/lesions/{answer['lesion_id']}/images/{answer['image_id']}"


async def erase(service, answer: dict[str, Any], **body: object):
    return await service.client.request(
        "DELETE",
        path(answer),
        json={"reason": "patient_request", **body},
        headers=service.token("chief", ("supervisor",)),
    )


def request_of(answer: dict[str, Any]) -> ErasureRequest:
    from uuid import UUID

    return ErasureRequest(
        lesion_id=UUID(answer["lesion_id"]),
        image_id=UUID(answer["image_id"]),
        reason=ErasureReason.WRONG_PATIENT,
        actor="chief",
        request_id="crashed",
    )


async def row(service, answer: dict[str, Any]) -> Any:
    return await service.owner.fetchrow(
        "SELECT i.*, a.outcome, a.answer, a.context,"
        " (SELECT count(*) FROM lesion_embeddings AS e WHERE e.image_id = i.image_id) AS vectors"
        " FROM lesion_images AS i JOIN assessments AS a USING (image_id) WHERE image_id = $1::text::uuid",
        answer["image_id"],
    )


async def test_erasing_leaves_a_tombstone_and_a_receipt_that_can_be_checked(service, answer) -> None:
    before = await row(service, answer)
    assert before["vectors"] == 1
    response = await erase(service, answer, note="asked for in writing")
    assert response.status_code == 200, response.text
    receipt = response.json()
    service.hold_to("ErasureDocument", receipt)
    assert receipt["ciphertext_sha256"] == sha256(before["sealed"]).hexdigest()
    assert receipt["data_key_id"] == str(before["data_key_id"])
    fields = [
        "derm-cds erasure receipt 1",
        *(receipt[name] for name in ("receipt_id", "image_id", "erased_at", "actor", "reason")),
        *(receipt[name] for name in ("ciphertext_sha256", "data_key_id")),
    ]
    text = json.dumps(fields, separators=(",", ":"))
    assert receipt["record_hash"] == sha256(text.encode()).hexdigest()
    after = await row(service, answer)
    assert (after["sealed"], after["answer"], after["context"], after["vectors"]) == (None, None, {}, 0)
    assert after["outcome"] == "erased"
    events = await service.events(response)
    assert [event["action"] for event in events] == ["erase", "erased"]
    assert events[1]["detail"]["record_hash"] == receipt["record_hash"]
    assert "in writing" not in json.dumps([event["detail"] for event in events])


async def test_a_second_delete_and_a_reader_get_the_same_receipt(service, answer) -> None:
    first = (await erase(service, answer)).json()
    again = await erase(service, answer, reason="wrong_patient")
    assert (again.status_code, again.json()) == (200, first)
    assert [event["action"] for event in await service.events(again)] == ["erase"]
    read = await service.client.get(f"{path(answer)}/receipt", headers=service.token("dr"))
    assert (read.status_code, read.json()) == (200, first)


async def test_every_way_to_an_erased_image_says_that_it_is(service, answer) -> None:
    receipt = (await erase(service, answer)).json()
    gone = await service.client.get(path(answer), headers=service.token("dr"))
    service.hold_to_problem(gone, 410, "erased")
    (event,) = await service.events(gone)
    assert (event["outcome"], event["detail"]) == ("failed", {"code": "erased"})
    lesion = f"/api/lesions/{answer['lesion_id']}"
    seen = (await service.client.get(lesion, headers=service.token("dr"))).json()
    service.hold_to("TimelineDocument", seen)
    (shown,) = seen["assessments"]
    assert (shown["outcome"], shown["risk"], shown["classification"]) == ("erased", None, None)
    assert shown["erasure"]["receipt_id"] == receipt["receipt_id"]
    replayed = (await service.replay(answer)).json()
    service.hold_to("ReplayDocument", replayed)
    assert (replayed["verdict"], replayed["cause"]["code"]) == ("cannot", "image_erased")
    page = await service.client.get(
        "/api/lesions", params={"patient_id": answer["patient_id"]}, headers=service.token("dr")
    )
    service.hold_to("WorklistDocument", page.json())
    assert page.json()["lesions"][0]["latest"]["outcome"] == "erased"


async def test_a_follow_up_is_not_compared_with_an_erased_image(service, answer, drawn_lesion) -> None:
    await erase(service, answer)
    patient, lesion = answer["patient_id"], answer["lesion_id"]
    after = await service.upload(patient, image=drawn_lesion(seed=3), lesion_id=lesion)
    assert after.json()["change"] is None


async def test_a_repeated_upload_does_not_bring_it_back(service) -> None:
    patient, headers = await service.care(), {"Idempotency-Key": "erased-since"}
    answer = (await service.upload(patient, headers=headers)).json()
    await erase(service, answer)
    before = await service.counts()
    service.hold_to_problem(await service.upload(patient, headers=headers), 410, "erased")
    assert (await service.counts())["lesion_images"] == before["lesion_images"]


async def test_who_may_not_erase(service, answer) -> None:
    response = await service.client.request(
        "DELETE", path(answer), json={"reason": "patient_request"}, headers=service.token("dr")
    )
    service.hold_to_problem(response, 403, "forbidden")
    assert (await row(service, answer))["sealed"] is not None


@pytest.mark.parametrize(
    "body",
    [{"reason": "retention"}, {"reason": ""}, {"note": ""}, {"note": "x" * 501}, {"note": "\0"}, {"x": 1}],
)
async def test_a_reason_that_is_none_erases_nothing(service, answer, body: dict[str, object]) -> None:
    service.hold_to_problem(await erase(service, answer, **body), 422, "invalid_field")
    assert (await row(service, answer))["sealed"] is not None


@pytest.mark.parametrize("kind", ["patient_id", "lesion_id", "image_id"])
async def test_a_hold_keeps_an_image_until_it_is_released(service, answer, kind: str) -> None:
    holds = HoldStore(service.owner)
    hold = await holds.set(Held(**{kind: answer[kind]}), reason="case 7", actor="counsel")
    refused = await erase(service, answer)
    service.hold_to_problem(refused, 409, "legal_hold")
    (event,) = await service.events(refused)
    assert (event["outcome"], event["detail"]) == ("failed", {"code": "legal_hold"})
    await holds.release(hold, actor="counsel")
    assert (await erase(service, answer)).status_code == 200
    actions = await service.owner.fetch(
        "SELECT action FROM audit_events WHERE detail ->> 'hold_id' = $1 ORDER BY event_id", str(hold)
    )
    assert [event["action"] for event in actions] == ["hold_set", "hold_release"]


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
    assert await recover_once(services.records, services.triage, services.live, orphaned_after_s=0) == 0
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
            await recover_once(services.records, services.triage, services.live, orphaned_after_s=0)
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

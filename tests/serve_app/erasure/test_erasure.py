"""An image destroyed for good: what is gone, what stays, and who may."""

from __future__ import annotations

from hashlib import sha256
import json

import pytest

from serve_app.access.rules import purpose_of
from serve_app.audit.events import AuditEvent
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import Held, HoldStore
from tests.serve_app.erasure.erasing import erase, followed, path, row


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
    assert [event["purpose"] for event in events] == ["PATRQT", "PATRQT"]
    assert events[1]["detail"]["record_hash"] == receipt["record_hash"]
    assert "in writing" not in json.dumps([event["detail"] for event in events])


async def test_a_second_delete_and_a_reader_get_the_same_receipt(service, answer) -> None:
    first = (await erase(service, answer)).json()
    again = await erase(service, answer, reason="wrong_patient")
    assert (again.status_code, again.json()) == (200, first)
    assert [event["action"] for event in await service.events(again)] == ["erase"]
    read = await service.client.get(f"{path(answer)}/receipt", headers=service.token("a", ("auditor",)))
    assert (read.status_code, read.json()) == (200, first)
    receipt_id = first["receipt_id"]
    event = await service.hold_to_event(read, "read_receipt", "success", receipt_id=receipt_id)
    assert event["purpose"] == "HCOMPL"


@pytest.mark.parametrize("reason", [reason for reason in ErasureReason if reason != "retention"])
async def test_an_erasure_is_recorded_with_the_purpose_of_its_reason(service, answer, reason: str) -> None:
    """The first event is the database's own function's, the second ours: they agree."""
    events = await service.events(await erase(service, answer, reason=reason))
    purpose = purpose_of(
        AuditEvent(action="erased", actor="a", outcome="success", request_id="r", detail={"reason": reason})
    )
    assert [event["purpose"] for event in events] == [purpose, purpose]


async def test_every_way_to_an_erased_image_says_that_it_is(service, answer) -> None:
    receipt = (await erase(service, answer)).json()
    gone = await service.get(path(answer))
    await service.hold_to_failure(gone, 410, "erased", "download")
    seen = (await service.get(f"/api/lesions/{answer['lesion_id']}")).json()
    service.hold_to("TimelineDocument", seen)
    (shown,) = seen["assessments"]
    assert (shown["outcome"], shown["risk"], shown["classification"]) == ("erased", None, None)
    assert shown["erasure"]["receipt_id"] == receipt["receipt_id"]
    replayed = (await service.replay(answer)).json()
    service.hold_to("ReplayDocument", replayed)
    assert (replayed["verdict"], replayed["cause"]["code"]) == ("cannot", "image_erased")
    page = await service.get("/api/lesions", params={"patient_id": answer["patient_id"]})
    service.hold_to("LesionListDocument", page.json())
    assert page.json()["lesions"][0]["latest"]["outcome"] == "erased"


async def test_a_follow_up_is_not_compared_with_an_erased_image(service, answer, drawn_lesion) -> None:
    await erase(service, answer)
    assert (await followed(service, answer, image=drawn_lesion(seed=3)))["change"] is None


async def test_a_repeated_upload_does_not_bring_it_back(service) -> None:
    patient, headers = await service.care(), {"Idempotency-Key": "erased-since"}
    answer = (await service.upload(patient, headers=headers)).json()
    await erase(service, answer)
    before = await service.counts()
    service.hold_to_problem(await service.upload(patient, headers=headers), 410, "erased")
    assert (await service.counts())["lesion_images"] == before["lesion_images"]


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
    await service.hold_to_failure(refused, 409, "legal_hold", "erase")
    await holds.release(hold, actor="counsel")
    assert (await erase(service, answer)).status_code == 200
    actions = await service.owner.fetch(
        "SELECT action FROM audit_events WHERE detail ->> 'hold_id' = $1 ORDER BY event_id", str(hold)
    )
    assert [event["action"] for event in actions] == ["hold_set", "hold_release"]

"""A retry after a lost connection yields one record."""

from __future__ import annotations

import asyncio
from collections import Counter
import json
import threading
from unittest.mock import AsyncMock
from uuid import uuid4

import pytest

from serve_app.domain.errors import RecordsUnavailable
from serve_app.http.bodies import UploadForm


def key(value: str) -> dict[str, str]:
    return {"Idempotency-Key": value}


async def test_the_same_key_and_body_is_one_record(service) -> None:
    patient = await service.care()
    before = await service.counts()
    first = await service.upload(patient, headers=key("same"), age_approx="40", sex="male")
    assert (await service.counts())["idempotency_keys"] - before["idempotency_keys"] == 1
    async with service.storing_nothing():  # but that the record was looked at again
        second = await service.upload(patient, headers=key("same"), sex="male", age_approx="40")
    assert (first.status_code, second.status_code) == (201, 201)
    assert second.json() == first.json()
    assert second.headers["location"] == first.headers["location"]
    names = ("patient_id", "lesion_id", "image_id", "assessment_id")
    about = {"about": first.json(), "names": names}
    event = await service.hold_to_event(second, "read", "success", **about, repeated="upload")
    assert event["actor"] == "dr"


async def test_the_same_key_with_another_body_is_refused(service, drawn_lesion) -> None:
    patient = await service.care()
    # One that is rejected does not spend its key.
    assert (await service.upload(patient, image=b"GIF89a", headers=key("other"))).status_code == 415
    assert (await service.upload(patient, headers=key("other"))).status_code == 201
    for changed in (
        {"age_approx": "41"},
        {"params": {"top_k": 3}},
        {"params": {"licence": "CC-0"}},
        {"params": {"confirmed": "true"}},
        {"history": json.dumps({"family_melanoma": True})},
        *({"skin_type": "VI"}, {"device": "DermLite DL5"}, {"impression": '{"diagnosis": "NV"}'}),
        {"image": drawn_lesion(seed=9)},
    ):
        async with service.storing_nothing():
            response = await service.upload(patient, headers=key("other"), **changed)
        await service.hold_to_failure(response, 422, "idempotency_mismatch", "upload")


async def test_of_two_at_once_with_one_key_another_body_is_refused(
    service, drawn_lesion, monkeypatch
) -> None:
    """The second looks for the key before the first has committed, and finds it when it would commit itself."""
    patient, records = await service.care(), service.app.state.services.records
    assert (await service.upload(patient, headers=key("overtaken"))).status_code == 201
    found = await records.find_replay("dr", "overtaken")
    looks = AsyncMock(side_effect=[None, found])
    monkeypatch.setattr(type(records), "find_replay", looks)
    response = await service.upload(patient, headers=key("overtaken"), image=drawn_lesion(seed=9))
    await service.hold_to_failure(response, 422, "idempotency_mismatch", "upload")
    assert looks.await_count == 2


async def test_six_at_once_with_one_key_are_one_record(service) -> None:
    patient = await service.care()
    before = await service.counts()
    uploads = (service.upload(patient, headers=key("at-once"), age_approx="30") for _ in range(6))
    responses = await asyncio.gather(*uploads)
    assert {response.status_code for response in responses} <= {201, 202}
    assert len({response.json()["assessment_id"] for response in responses}) == 1
    after = await service.counts()
    for table in ("lesions", "lesion_images", "assessments", "idempotency_keys", "lesion_embeddings"):
        assert after[table] - before[table] == 1, table
    # One upload with its classification, and five looks at it.
    assert after["audit_events"] - before["audit_events"] == 2 + 5
    events = [event for response in responses for event in await service.events(response)]
    assert Counter(event["action"] for event in events) == {"upload": 1, "classify": 1, "read": 5}


@pytest.mark.parametrize("value", ["", " ", "a b", "x" * 256, "a\tb"])
async def test_a_key_is_visible_ascii(service, value: str) -> None:
    response = await service.upload(await service.care(), headers=key(value))
    service.hold_to_problem(response, 422, "invalid_field")
    assert [event["outcome"] for event in await service.events(response)] == ["failed"]


async def test_a_repeat_that_cannot_be_recorded_is_not_answered(service, monkeypatch) -> None:
    patient = await service.care()
    assert (await service.upload(patient, headers=key("unrecorded"))).status_code == 201
    unavailable = AsyncMock(side_effect=RecordsUnavailable)
    monkeypatch.setattr(service.app.state.services.records, "record_event", unavailable)
    async with service.storing_nothing(events=0):
        response = await service.upload(patient, headers=key("unrecorded"))
    service.hold_to_problem(response, 503, "records_unavailable")
    monkeypatch.undo()
    assert (await service.upload(patient, headers=key("unrecorded"))).status_code == 201


async def test_a_repeat_in_an_emergency_says_so(service) -> None:
    patient, subject = await service.care("dr-owner"), f"dr-{uuid4().hex[:8]}"
    opened = await service.client.post(
        "/api/emergency-access",
        json={"patient_id": patient, "reason": "unconscious in casualty"},
        headers=service.token(subject),
    )
    for expected in ({"upload", "classify"}, {"read"}):
        response = await service.upload(patient, subject=subject, headers=key("emergency"))
        events = await service.events(response)
        assert {event["action"] for event in events} == expected
        assert all(event["detail"]["emergency_access"] == opened.json()["emergency_id"] for event in events)


async def test_an_image_is_hashed_away_from_the_event_loop_and_only_for_a_key(service, monkeypatch) -> None:
    """20 MB take long enough to hold every other request up."""
    threads: list[int] = []
    real = UploadForm.fingerprint

    def noting(form: UploadForm, *extra: str) -> bytes:
        threads.append(threading.get_ident())
        return real(form, *extra)

    monkeypatch.setattr(UploadForm, "fingerprint", noting)
    patient = await service.care()
    assert (await service.upload(patient)).status_code == 201
    assert threads == []
    assert (await service.upload(patient, headers=key("hashed-elsewhere"))).status_code == 201
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()

"""Between the two commits: what was acknowledged is finished, exactly once; what was not is not there."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pytest

from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import recovery, triage
from tests.serve_app.erasure.erasing import (
    change,
    damage,
    end_leases,
    recover,
    recover_expired,
    row,
    uploaded,
)
from tests.serve_app.lesions.conftest import Held, failing, hang


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("classify", StageFailed()),
        ("embed", Overloaded()),
        ("nearest", ValueError("a defect")),
        ("conclude", StageFailed()),
    ],
    ids=str,
)
async def test_a_failure_after_the_first_commit_is_pending_and_is_finished(
    faulty, stages, stage: str, error: Exception
) -> None:
    stages.alter(stage, failing(error), calls={1})
    patient = await faulty.care()
    headers = {"Idempotency-Key": stage}
    before = await faulty.counts()
    response = await faulty.upload(patient, headers=headers)
    assert response.status_code == 202, response.text
    assert int(response.headers["retry-after"]) > 0
    pending = response.json()
    faulty.hold_to("AssessmentDocument", pending)
    assert pending["outcome"] == "pending"
    assert pending["reasons"][0]["action"]
    location = response.headers["location"]
    assert location == f"/api/lesions/{pending['lesion_id']}"
    seen = (await faulty.get(location)).json()
    assert seen["assessments"] == [pending]
    page = await faulty.get("/api/lesions", params={"patient_id": patient})
    assert page.json()["lesions"][0]["latest"]["outcome"] == "pending"
    replayed = await faulty.upload(patient, headers=headers)
    assert (replayed.status_code, replayed.json()) == (202, pending)

    assert await recover(faulty) == 1
    assert await recover(faulty) == 0
    replayed = await faulty.upload(patient, headers=headers)
    assert replayed.status_code == 201
    answer = replayed.json()
    faulty.hold_to("AssessmentDocument", answer)
    assert answer["outcome"] in {"decided", "review"}
    for name in ("assessment_id", "lesion_id", "image_id", "created_at"):
        assert answer[name] == pending[name]
    seen = (await faulty.get(location)).json()
    assert answer.pop("open_demand") == seen["open_demand"]
    assert seen["assessments"] == [answer]
    after = await faulty.counts()
    for table in ("lesions", "lesion_images", "assessments", "lesion_embeddings", "idempotency_keys"):
        assert after[table] - before[table] == 1, table
    events = [event["action"] for event in await faulty.events(response)]
    assert events == ["upload", "classify"]


async def test_a_recovered_follow_up_is_compared_with_the_visit_before(faulty, stages, drawn_lesion) -> None:
    stages.alter("embed", failing(StageFailed()), calls={2})
    first = await uploaded(faulty)
    patient, lesion = first["patient_id"], first["lesion_id"]
    response = await faulty.upload(patient, image=drawn_lesion(seed=2), lesion_id=lesion)
    assert response.status_code == 202
    assert await recover(faulty) == 1
    seen = await faulty.get(response.headers["location"])
    newest, oldest = seen.json()["assessments"]
    assert newest["change"]["compared_image_id"] == first["image_id"]
    first.pop("open_demand")
    assert oldest == first


async def test_two_recoveries_at_once_finish_it_once(faulty, stages, service) -> None:
    stages.alter("classify", failing(StageFailed()), calls={1})
    response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    await end_leases(service)
    completed = await asyncio.gather(*map(recover_expired, (service, faulty)))
    assert sorted(completed) == [0, 1]
    assert len(await service.events(response)) == 2


async def test_one_that_cannot_be_finished_does_not_hold_up_the_others(faulty, stages) -> None:
    stages.alter("classify", failing(StageFailed()), calls={1, 2})
    lost, kept = [await faulty.upload(await faulty.care()) for _ in range(2)]
    assert (lost.status_code, kept.status_code) == (202, 202)
    await damage(faulty, lost.json())
    assert await recover(faulty) == 1
    outcomes = [(await row(faulty, response.json()))["outcome"] for response in (lost, kept)]
    assert outcomes[0] == "pending" != outcomes[1]
    await faulty.owner.execute("DELETE FROM assessments WHERE outcome = 'pending'")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Overloaded(), 503, "overloaded"),
        (StageFailed(), 503, "stage_failed"),
        (KeyError("secret-detail"), 500, "internal"),
    ],
    ids=str,
)
async def test_a_failure_before_the_first_commit_stores_nothing(faulty, stages, error, status, code) -> None:
    stages.alter("prepare", failing(error), calls={1})
    patient = await faulty.care()
    headers = {"Idempotency-Key": f"before-{code}"}
    before = await faulty.counts()
    response = await faulty.upload(patient, headers=headers)
    faulty.hold_to_problem(response, status, code)
    assert "secret-detail" not in response.text
    if status == 503:
        assert int(response.headers["retry-after"]) > 0
    # Refused at capacity, nothing was looked at; a stage that fails is on record.
    recorded = [(event["outcome"], event["detail"]) for event in await faulty.events(response)]
    assert recorded == ([] if code == "overloaded" else [("failed", {"code": code})])
    assert await faulty.counts() == {**before, "audit_events": before["audit_events"] + len(recorded)}
    assert (await faulty.upload(patient, headers=headers)).status_code == 201


async def test_a_stage_that_hangs_is_pending_at_the_deadline(faulty, stages, monkeypatch) -> None:
    stages.alter("nearest", hang, calls={1})
    monkeypatch.setattr(triage, "DEADLINE_S", 0.5)
    response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    assert await recover(faulty) == 1


async def leave(service, held: Held, patient: str, headers: dict[str, str]) -> None:
    """Ask, and be gone before the answer."""
    request = asyncio.create_task(service.upload(patient, headers=headers))
    await asyncio.wait_for(held.reached.wait(), 20)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_a_caller_who_leaves_is_answered_on_record(faulty, stages) -> None:
    held, headers = Held(), {"Idempotency-Key": "left"}
    stages.alter("embed", held, calls={1})
    patient = await faulty.care()
    await leave(faulty, held, patient, headers)
    assert (await faulty.upload(patient, headers=headers)).status_code == 202
    assert await recover(faulty) == 1
    assert (await faulty.upload(patient, headers=headers)).status_code == 201


async def test_a_caller_who_leaves_before_the_first_commit_leaves_nothing(faulty, stages) -> None:
    stages.alter("prepare", held := Held(), calls={1})
    patient, before = await faulty.care(), await faulty.counts()
    await leave(faulty, held, patient, {})
    assert await faulty.counts() == before


async def test_a_body_that_breaks_off_leaves_nothing(service) -> None:
    before = await service.counts()
    part = b'--b\r\nContent-Disposition: form-data; name="image"'
    messages = [{"type": "http.request", "body": part, "more_body": True}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = {**service.token("dr"), "content-type": "multipart/form-data; boundary=b"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/lesions",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    await service.app(scope, receive, send)
    assert not any(message.get("status", 0) >= 500 for message in sent)
    assert {**await service.counts(), "audit_events": 0} == {**before, "audit_events": 0}


async def test_a_live_request_is_not_overtaken_whatever_the_clocks_say(faulty, stages, monkeypatch) -> None:
    """The application's clock may be behind the database's: what counts is the lease that T1 itself took."""
    held = Held()

    class HourBehind(datetime):
        @classmethod
        def now(cls, zone: tzinfo | None = None) -> datetime:
            return datetime.now(zone) - timedelta(hours=1)

    monkeypatch.setattr(triage, "datetime", HourBehind)
    stages.alter("embed", held, calls={1})
    upload = asyncio.create_task(faulty.upload(await faulty.care()))
    await asyncio.wait_for(held.reached.wait(), 60)
    assert await recover_expired(faulty) == 0
    held.go_on.set()
    response = await upload
    assert response.status_code == 201
    assert (await row(faulty, response.json()))["attempts"] == 0
    assert stages.seen == 1


async def test_only_what_is_worked_on_is_leased(faulty, stages, service) -> None:
    stages.alter("classify", failing(StageFailed()), calls={1, 2, 3})
    uploads = [await faulty.upload(await faulty.care()) for _ in range(3)]
    assert [response.status_code for response in uploads] == [202] * 3
    stages.alter("prepare", held := Held(), calls={1})
    recovering = asyncio.create_task(recover(faulty))
    await asyncio.wait_for(held.reached.wait(), 60)
    assert await recover_expired(service) == 2
    held.go_on.set()
    assert await recovering == 1


SETBACKS = 2


@pytest.fixture
def _gives_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "FAILED_AFTER_SETBACKS", SETBACKS)


@pytest.mark.usefixtures("_gives_up_soon")
async def test_an_image_that_a_stage_always_fails_on_ends_as_failed_while_others_are_answered(
    faulty, stages, service
) -> None:
    stages.alter("conclude", failing(ValueError()))
    response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    before = (await service.client.get("/readyz")).json()["assessments"]
    assert before["pending"] >= 1
    assert before["oldest_pending_s"] >= 0
    for _ in range(SETBACKS + 1):
        assert (await row(faulty, response.json()))["outcome"] == "pending"
        assert await recover(faulty) == 0
        # Somebody else's image is answered meanwhile: it is not the service that fails, but it on this one.
        assert (await service.upload(await service.care())).status_code == 201
    after = (await service.client.get("/readyz")).json()["assessments"]
    assert (after["pending"], after["failed"]) == (before["pending"] - 1, before["failed"] + 1)
    seen = await service.get(response.headers["location"])
    (shown,) = seen.json()["assessments"]
    assert (shown["outcome"], shown["reasons"][0]["code"]) == ("failed", "internal")
    events = [(event["action"], event["outcome"]) for event in await service.events(response)]
    assert events == [("upload", "success"), ("classify", "failed")]


@pytest.mark.usefixtures("_gives_up_soon")
@pytest.mark.parametrize("error", [StageFailed(), ValueError(), Overloaded()], ids=repr)
async def test_an_outage_ends_no_image(faulty, stages, service, error: Exception) -> None:
    """However often it is tried: nothing else is answered meanwhile, or the service says that it is full."""
    stages.alter("conclude", failing(error))
    response = await faulty.upload(await faulty.care())
    for _ in range(SETBACKS + 3):
        assert await recover(faulty) == 0
        if isinstance(error, Overloaded):
            assert (await service.upload(await service.care())).status_code == 201
    assert (await row(faulty, response.json()))["outcome"] == "pending"
    assert await recover(service) == 1


async def test_after_a_week_it_is_told_that_no_answer_will_come(faulty, stages) -> None:
    stages.alter("conclude", failing(StageFailed()))
    response = await faulty.upload(await faulty.care())
    assert await recover(faulty) == 0
    assert (await row(faulty, response.json()))["outcome"] == "pending"
    await change(faulty, response.json(), "assessments", "created_at = created_at - interval '8 days'")
    assert await recover(faulty) == 0
    found = await row(faulty, response.json())
    assert (found["outcome"], found["failure"]) == ("failed", "stage_failed")

"""Between the two commits: what was acknowledged is finished, exactly once; what was not is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pytest

from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import recovery, triage
from serve_app.lesions.recovery import recover_once
from tests.serve_app.erasure.erasing import damage


class Faulty:
    """The real stages, but one of them fails: `fault` runs before `stage`'s n-th call, from 1."""

    def __init__(self, stages: Any, stage: str, fault: Callable[[], Any], *, calls: Collection[int]) -> None:
        self._stages = stages
        self.fail(stage, fault, calls=calls)

    def fail(self, stage: str, fault: Callable[[], Any], *, calls: Collection[int] = (1,)) -> None:
        """From now on, this stage is the one."""
        self._stage, self._fault, self._calls, self.seen = stage, fault, calls, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._stages, name)
        if name != self._stage:
            return real

        async def call(*args: Any) -> Any:
            self.seen += 1
            if self.seen in self._calls:
                await self._fault()
            return await real(*args)

        return call


class Held:
    """A fault that says when it is reached, and waits until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.go_on.wait()


def failing(error: Exception) -> Callable[[], Any]:
    async def fail() -> None:
        raise error

    return fail


@pytest.fixture(scope="module")
async def _stages_and_service(start_service, local_stages) -> AsyncIterator[tuple[Faulty, Any]]:
    stages = Faulty(local_stages(), "", failing(StageFailed()), calls=())
    async with start_service(stages, raise_app_exceptions=False) as service:
        yield stages, service


@pytest.fixture
def stages(_stages_and_service) -> Faulty:
    """The stages of `faulty`, whole until a test has one fail."""
    stages, _ = _stages_and_service
    stages.fail("", failing(StageFailed()), calls=())
    return stages


@pytest.fixture
def faulty(_stages_and_service, stages) -> Any:
    """A service over stages that a test can have fail."""
    return _stages_and_service[1]


async def end_leases(service) -> None:
    await service.owner.execute("UPDATE assessments SET lease_until = NULL WHERE outcome = 'pending'")


async def recover(service) -> int:
    """Recover what is pending as if every lease on it had ended."""
    await end_leases(service)
    services = service.app.state.services
    return await recover_once(services.records, services.triage, services.live)


async def row_of(service, response) -> dict[str, Any]:
    """The assessment of an upload as it is on record."""
    query = "SELECT * FROM assessments WHERE assessment_id = $1::text::uuid"
    return dict(await service.owner.fetchrow(query, response.json()["assessment_id"]))


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
    stages.fail(stage, failing(error))
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
    seen = (await faulty.client.get(location, headers=faulty.token("dr"))).json()
    assert seen["assessments"] == [pending]
    page = await faulty.client.get("/api/lesions", params={"patient_id": patient}, headers=faulty.token("dr"))
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
    seen = (await faulty.client.get(location, headers=faulty.token("dr"))).json()
    assert answer.pop("open_demand") == seen["open_demand"]
    assert seen["assessments"] == [answer]
    after = await faulty.counts()
    for table in ("lesions", "lesion_images", "assessments", "lesion_embeddings", "idempotency_keys"):
        assert after[table] - before[table] == 1, table
    events = [event["action"] for event in await faulty.events(response)]
    assert events == ["upload", "classify"]


async def test_a_recovered_follow_up_is_compared_with_the_visit_before(faulty, stages, drawn_lesion) -> None:
    stages.fail("embed", failing(StageFailed()), calls={2})
    patient = await faulty.care()
    first = (await faulty.upload(patient)).json()
    response = await faulty.upload(patient, image=drawn_lesion(seed=2), lesion_id=first["lesion_id"])
    assert response.status_code == 202
    assert await recover(faulty) == 1
    seen = await faulty.client.get(response.headers["location"], headers=faulty.token("dr"))
    newest, oldest = seen.json()["assessments"]
    assert newest["change"]["compared_image_id"] == first["image_id"]
    first.pop("open_demand")
    assert oldest == first


async def test_two_recoveries_at_once_finish_it_once(faulty, stages, service) -> None:
    stages.fail("classify", failing(StageFailed()))
    response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    await end_leases(service)
    both = (each.app.state.services for each in (service, faulty))
    completed = await asyncio.gather(*(recover_once(each.records, each.triage, each.live) for each in both))
    assert sorted(completed) == [0, 1]
    assert len(await service.events(response)) == 2


async def test_one_that_cannot_be_finished_does_not_hold_up_the_others(faulty, stages) -> None:
    stages.fail("classify", failing(StageFailed()), calls={1, 2})
    lost, kept = [await faulty.upload(await faulty.care()) for _ in range(2)]
    assert (lost.status_code, kept.status_code) == (202, 202)
    await damage(faulty, lost.json())
    assert await recover(faulty) == 1
    outcomes = [(await row_of(faulty, response))["outcome"] for response in (lost, kept)]
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
async def test_a_failure_before_the_first_commit_stores_nothing(
    faulty, stages, error: Exception, status: int, code: str
) -> None:
    stages.fail("prepare", failing(error))
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
    stages.fail("nearest", lambda: asyncio.sleep(3600))
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
    stages.fail("embed", held)
    patient = await faulty.care()
    await leave(faulty, held, patient, headers)
    assert (await faulty.upload(patient, headers=headers)).status_code == 202
    assert await recover(faulty) == 1
    assert (await faulty.upload(patient, headers=headers)).status_code == 201


async def test_a_caller_who_leaves_before_the_first_commit_leaves_nothing(faulty, stages) -> None:
    stages.fail("prepare", held := Held())
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
    stages.fail("embed", held)
    upload = asyncio.create_task(faulty.upload(await faulty.care()))
    await asyncio.wait_for(held.reached.wait(), 60)
    services = faulty.app.state.services
    assert await recover_once(services.records, services.triage, services.live) == 0
    held.go_on.set()
    response = await upload
    assert response.status_code == 201
    assert (await row_of(faulty, response))["attempts"] == 0
    assert stages.seen == 1


async def test_only_what_is_worked_on_is_leased(faulty, stages, service) -> None:
    stages.fail("classify", failing(StageFailed()), calls={1, 2, 3})
    uploads = [await faulty.upload(await faulty.care()) for _ in range(3)]
    assert [response.status_code for response in uploads] == [202] * 3
    stages.fail("prepare", held := Held())
    recovering = asyncio.create_task(recover(faulty))
    await asyncio.wait_for(held.reached.wait(), 60)
    services = service.app.state.services
    assert await recover_once(services.records, services.triage, services.live) == 2
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
    stages.fail("conclude", failing(ValueError()), calls=range(100))
    response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    before = (await service.client.get("/readyz")).json()["assessments"]
    assert before["pending"] >= 1
    assert before["oldest_pending_s"] >= 0
    for _ in range(SETBACKS + 1):
        assert (await row_of(faulty, response))["outcome"] == "pending"
        assert await recover(faulty) == 0
        # Somebody else's image is answered meanwhile: it is not the service that fails, but it on this one.
        assert (await service.upload(await service.care())).status_code == 201
    after = (await service.client.get("/readyz")).json()["assessments"]
    assert (after["pending"], after["failed"]) == (before["pending"] - 1, before["failed"] + 1)
    seen = await service.client.get(response.headers["location"], headers=service.token("dr"))
    (shown,) = seen.json()["assessments"]
    assert (shown["outcome"], shown["reasons"][0]["code"]) == ("failed", "internal")
    events = [(event["action"], event["outcome"]) for event in await service.events(response)]
    assert events == [("upload", "success"), ("classify", "failed")]


@pytest.mark.usefixtures("_gives_up_soon")
@pytest.mark.parametrize("error", [StageFailed(), ValueError(), Overloaded()], ids=repr)
async def test_an_outage_ends_no_image(faulty, stages, service, error: Exception) -> None:
    """However often it is tried: nothing else is answered meanwhile, or the service says that it is full."""
    stages.fail("conclude", failing(error), calls=range(100))
    response = await faulty.upload(await faulty.care())
    for _ in range(SETBACKS + 3):
        assert await recover(faulty) == 0
        if isinstance(error, Overloaded):
            assert (await service.upload(await service.care())).status_code == 201
    assert (await row_of(faulty, response))["outcome"] == "pending"
    assert await recover(service) == 1


async def test_after_a_week_it_is_told_that_no_answer_will_come(faulty, stages) -> None:
    stages.fail("conclude", failing(StageFailed()), calls=range(100))
    response = await faulty.upload(await faulty.care())
    assert await recover(faulty) == 0
    assert (await row_of(faulty, response))["outcome"] == "pending"
    await faulty.owner.execute(
        "UPDATE assessments SET created_at = created_at - interval '8 days' WHERE outcome = 'pending'"
    )
    assert await recover(faulty) == 0
    found = await row_of(faulty, response)
    assert (found["outcome"], found["failure"]) == ("failed", "stage_failed")

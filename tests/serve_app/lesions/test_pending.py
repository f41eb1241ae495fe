"""Between the two commits: what was acknowledged is finished, exactly once; what was not is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from typing import Any

import pytest

from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import recovery, triage
from serve_app.lesions.recovery import recover_once
from tests.serve_app.erasure.erasing import damage


class Faulty:
    """The real stages, but one of them fails: `fault` runs before `stage`'s n-th call, from 1."""

    def __init__(self, stages: Any, stage: str, fault: Callable[[], Any], *, calls: set[int]) -> None:
        self._stages, self._stage, self._fault, self._calls = stages, stage, fault, calls
        self.seen = 0

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
    start_service, local_stages, stage: str, error: Exception
) -> None:
    stages = Faulty(local_stages(), stage, failing(error), calls={1})
    async with start_service(stages) as service:
        patient = await service.care()
        headers = {"Idempotency-Key": stage}
        before = await service.counts()
        response = await service.upload(patient, headers=headers)
        assert response.status_code == 202, response.text
        assert int(response.headers["retry-after"]) > 0
        pending = response.json()
        service.hold_to("AssessmentDocument", pending)
        assert pending["outcome"] == "pending"
        assert pending["reasons"][0]["action"]
        location = response.headers["location"]
        assert location == f"/api/lesions/{pending['lesion_id']}"
        seen = (await service.client.get(location, headers=service.token("dr"))).json()
        assert seen["assessments"] == [pending]
        page = await service.client.get(
            "/api/lesions", params={"patient_id": patient}, headers=service.token("dr")
        )
        assert page.json()["lesions"][0]["latest"]["outcome"] == "pending"
        replayed = await service.upload(patient, headers=headers)
        assert (replayed.status_code, replayed.json()) == (202, pending)

        assert await recover(service) == 1
        assert await recover(service) == 0
        replayed = await service.upload(patient, headers=headers)
        assert replayed.status_code == 201
        answer = replayed.json()
        service.hold_to("AssessmentDocument", answer)
        assert answer["outcome"] in {"decided", "review"}
        for name in ("assessment_id", "lesion_id", "image_id", "created_at"):
            assert answer[name] == pending[name]
        seen = (await service.client.get(location, headers=service.token("dr"))).json()
        assert answer.pop("open_demand") == seen["open_demand"]
        assert seen["assessments"] == [answer]
        after = await service.counts()
        for table in ("lesions", "lesion_images", "assessments", "lesion_embeddings", "idempotency_keys"):
            assert after[table] - before[table] == 1, table
        events = [event["action"] for event in await service.events(response)]
        assert events == ["upload", "classify"]


async def test_a_recovered_follow_up_is_compared_with_the_visit_before(
    start_service, local_stages, drawn_lesion
) -> None:
    stages = Faulty(local_stages(), "embed", failing(StageFailed()), calls={2})
    async with start_service(stages) as service:
        patient = await service.care()
        first = (await service.upload(patient)).json()
        response = await service.upload(patient, image=drawn_lesion(seed=2), lesion_id=first["lesion_id"])
        assert response.status_code == 202
        assert await recover(service) == 1
        seen = await service.client.get(response.headers["location"], headers=service.token("dr"))
        newest, oldest = seen.json()["assessments"]
        assert newest["change"]["compared_image_id"] == first["image_id"]
        first.pop("open_demand")
        assert oldest == first


async def test_two_recoveries_at_once_finish_it_once(start_service, local_stages, service) -> None:
    async with start_service(Faulty(local_stages(), "classify", failing(StageFailed()), calls={1})) as other:
        response = await other.upload(await other.care())
        assert response.status_code == 202
        await end_leases(service)
        both = (each.app.state.services for each in (service, other))
        completed = await asyncio.gather(
            *(recover_once(each.records, each.triage, each.live) for each in both)
        )
        assert sorted(completed) == [0, 1]
        assert len(await service.events(response)) == 2


async def test_one_that_cannot_be_finished_does_not_hold_up_the_others(start_service, local_stages) -> None:
    async with start_service(
        Faulty(local_stages(), "classify", failing(StageFailed()), calls={1, 2})
    ) as service:
        lost, kept = [await service.upload(await service.care()) for _ in range(2)]
        assert (lost.status_code, kept.status_code) == (202, 202)
        await damage(service, lost.json())
        assert await recover(service) == 1
        outcomes = [(await row_of(service, response))["outcome"] for response in (lost, kept)]
        assert outcomes[0] == "pending" != outcomes[1]
        await service.owner.execute("DELETE FROM assessments WHERE outcome = 'pending'")


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
    start_service, local_stages, error: Exception, status: int, code: str
) -> None:
    stages = Faulty(local_stages(), "prepare", failing(error), calls={1})
    async with start_service(stages, raise_app_exceptions=False) as service:
        patient = await service.care()
        headers = {"Idempotency-Key": f"before-{code}"}
        before = await service.counts()
        response = await service.upload(patient, headers=headers)
        service.hold_to_problem(response, status, code)
        assert "secret-detail" not in response.text
        if status == 503:
            assert int(response.headers["retry-after"]) > 0
        # Refused at capacity, nothing was looked at; a stage that fails is on record.
        recorded = [(event["outcome"], event["detail"]) for event in await service.events(response)]
        assert recorded == ([] if code == "overloaded" else [("failed", {"code": code})])
        assert await service.counts() == {**before, "audit_events": before["audit_events"] + len(recorded)}
        assert (await service.upload(patient, headers=headers)).status_code == 201


async def test_a_stage_that_hangs_is_pending_at_the_deadline(
    start_service, local_stages, monkeypatch
) -> None:
    async with start_service(
        Faulty(local_stages(), "nearest", lambda: asyncio.sleep(3600), calls={1})
    ) as service:
        monkeypatch.setattr(triage, "DEADLINE_S", 0.5)
        response = await service.upload(await service.care())
        assert response.status_code == 202
        assert await recover(service) == 1


async def leave(service, held: Held, patient: str, headers: dict[str, str]) -> None:
    """Ask, and be gone before the answer."""
    request = asyncio.create_task(service.upload(patient, headers=headers))
    await asyncio.wait_for(held.reached.wait(), 20)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request


async def test_a_caller_who_leaves_is_answered_on_record(start_service, local_stages) -> None:
    held, headers = Held(), {"Idempotency-Key": "left"}
    async with start_service(Faulty(local_stages(), "embed", held, calls={1})) as service:
        patient = await service.care()
        await leave(service, held, patient, headers)
        assert (await service.upload(patient, headers=headers)).status_code == 202
        assert await recover(service) == 1
        assert (await service.upload(patient, headers=headers)).status_code == 201


async def test_a_caller_who_leaves_before_the_first_commit_leaves_nothing(
    start_service, local_stages
) -> None:
    held = Held()
    async with start_service(Faulty(local_stages(), "prepare", held, calls={1})) as service:
        patient, before = await service.care(), await service.counts()
        await leave(service, held, patient, {})
        assert await service.counts() == before


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
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/api/lesions",
        "raw_path": b"/api/lesions",
        "root_path": "",
        "query_string": b"",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "server": ("derm", 80),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    await service.app(scope, receive, send)
    assert not any(message.get("status", 0) >= 500 for message in sent)
    assert {**await service.counts(), "audit_events": 0} == {**before, "audit_events": 0}


async def test_a_live_request_is_not_overtaken_whatever_the_clocks_say(
    start_service, local_stages, monkeypatch
) -> None:
    """The application's clock may be behind the database's: what counts is the lease that T1 itself took."""
    held = Held()

    class HourBehind(datetime):
        @classmethod
        def now(cls, zone: tzinfo | None = None) -> datetime:
            return datetime.now(zone) - timedelta(hours=1)

    monkeypatch.setattr(triage, "datetime", HourBehind)
    stages = Faulty(local_stages(), "embed", held, calls={1})
    async with start_service(stages) as service:
        upload = asyncio.create_task(service.upload(await service.care()))
        await asyncio.wait_for(held.reached.wait(), 60)
        services = service.app.state.services
        assert await recover_once(services.records, services.triage, services.live) == 0
        held.go_on.set()
        response = await upload
        assert response.status_code == 201
        assert (await row_of(service, response))["attempts"] == 0
        assert stages.seen == 1


async def test_only_what_is_worked_on_is_leased(start_service, local_stages, service) -> None:
    held = Held()
    failed = Faulty(local_stages(), "classify", failing(StageFailed()), calls={1, 2, 3})
    async with start_service(Faulty(failed, "prepare", held, calls={4})) as stuck:
        uploads = [await stuck.upload(await stuck.care()) for _ in range(3)]
        assert [response.status_code for response in uploads] == [202] * 3
        recovering = asyncio.create_task(recover(stuck))
        await asyncio.wait_for(held.reached.wait(), 60)
        services = service.app.state.services
        assert await recover_once(services.records, services.triage, services.live) == 2
        held.go_on.set()
        assert await recovering == 1


SETBACKS = 2


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch, start_service, local_stages) -> Callable[..., Any]:
    """Start a service whose last stage always fails, and which gives up after few setbacks."""
    monkeypatch.setattr(recovery, "FAILED_AFTER_SETBACKS", SETBACKS)

    def start(error: Exception) -> Any:
        return start_service(Faulty(local_stages(), "conclude", failing(error), calls=set(range(100))))

    return start


async def test_an_image_that_a_stage_always_fails_on_ends_as_failed_while_others_are_answered(
    fails, service
) -> None:
    async with fails(ValueError()) as broken:
        response = await broken.upload(await broken.care())
        assert response.status_code == 202
        before = (await service.client.get("/readyz")).json()["assessments"]
        assert before["pending"] >= 1
        assert before["oldest_pending_s"] >= 0
        for _ in range(SETBACKS + 1):
            assert (await row_of(broken, response))["outcome"] == "pending"
            assert await recover(broken) == 0
            # Somebody else's image is answered meanwhile: it is not the service that fails, but it on this one.
            assert (await service.upload(await service.care())).status_code == 201
        after = (await service.client.get("/readyz")).json()["assessments"]
        assert (after["pending"], after["failed"]) == (before["pending"] - 1, before["failed"] + 1)
        seen = await service.client.get(response.headers["location"], headers=service.token("dr"))
        (shown,) = seen.json()["assessments"]
        assert (shown["outcome"], shown["reasons"][0]["code"]) == ("failed", "internal")
        events = [(event["action"], event["outcome"]) for event in await service.events(response)]
        assert events == [("upload", "success"), ("classify", "failed")]


@pytest.mark.parametrize("error", [StageFailed(), ValueError(), Overloaded()], ids=repr)
async def test_an_outage_ends_no_image(fails, service, error: Exception) -> None:
    """However often it is tried: nothing else is answered meanwhile, or the service says that it is full."""
    async with fails(error) as broken:
        response = await broken.upload(await broken.care())
        for _ in range(SETBACKS + 3):
            assert await recover(broken) == 0
            if isinstance(error, Overloaded):
                assert (await service.upload(await service.care())).status_code == 201
        assert (await row_of(broken, response))["outcome"] == "pending"
        assert await recover(service) == 1


async def test_after_a_week_it_is_told_that_no_answer_will_come(fails) -> None:
    async with fails(StageFailed()) as broken:
        response = await broken.upload(await broken.care())
        assert await recover(broken) == 0
        assert (await row_of(broken, response))["outcome"] == "pending"
        await broken.owner.execute(
            "UPDATE assessments SET created_at = created_at - interval '8 days' WHERE outcome = 'pending'"
        )
        assert await recover(broken) == 0
        found = await row_of(broken, response)
        assert (found["outcome"], found["failure"]) == ("failed", "stage_failed")

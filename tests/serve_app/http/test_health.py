"""What /readyz and the metrics say of the loops and of what waits."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from serve_app.domain.errors import RecordsUnavailable, StageFailed
from tests.serve_app.conftest import until
from tests.serve_app.lesions.conftest import AlteredStages, failing

LOOPS = {
    *("live_model", "replica_report", "recovery", "sealing", "refusal_summaries", "invariants"),
    *("erasures", "sweeping", "drift"),
    *("report_counts", "reports"),
}


async def test_ready_shows_every_loop(service) -> None:
    ready = (await service.get("/readyz")).json()
    assert set(ready["loops"]) == LOOPS
    assert set(ready["audit"]) == {"checkpoint_at", "sound", "unsealed"}
    runs = {"running": True, "restarts": 0, "last_error": None}
    assert all(loop == runs for loop in ready["loops"].values())
    assert ready["findings"] == []


@pytest.mark.parametrize(
    ("peer", "forwarded", "told"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("127.0.0.1", "127.0.0.1, ::1", True),  # through a proxy, from this machine
        ("203.0.113.9", None, False),
        ("203.0.113.9", "127.0.0.1", False),  # forged
        ("127.0.0.1", "203.0.113.9", False),  # through a proxy, from another one
        ("127.0.0.1", "203.0.113.9, 127.0.0.1", False),  # through two
        ("127.0.0.1", "127.0.0.1, 203.0.113.9", False),  # forged, and a proxy's
        ("127.0.0.1", "unknown", False),
    ],
)
async def test_another_machine_is_told_that_it_is_ready_and_no_more(
    service, peer: str, forwarded: str | None, *, told: bool
) -> None:
    headers = {"X-Forwarded-For": forwarded} if forwarded else {}
    operator, clinician = service.token("ops", ("operator",)), service.token("dr")
    forged = {"Authorization": f"{operator['Authorization']}x"}
    transport = httpx.ASGITransport(service.app, client=(peer, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://derm") as client:

        async def ask(token: dict[str, str]) -> httpx.Response:
            return await client.get("/readyz", headers={**headers, **token})

        ready = (await ask({})).json()
        assert ready["status"] == "ready"
        assert len(ready) == 1 or told
        assert "loops" in (await ask(operator)).json()
        if not told:
            service.hold_to_problem(denied := await ask(clinician), 403, "forbidden")
            await service.hold_to_event(denied, "observe", "denied", reason="role")
            service.hold_to_problem(await ask(forged), 401, "unauthenticated")


async def test_the_database_is_asked_once_a_second_whoever_asks(service, monkeypatch) -> None:
    services, looks = service.app.state.services, 0
    count = services.counts

    async def counted() -> object:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.05)
        if looks == 2:
            raise RecordsUnavailable
        return await count()

    monkeypatch.setattr(services, "counts", counted)
    monkeypatch.setattr("serve_app.http.services.READY_FOR_S", 0.4, raising=False)

    async def ask(times: int) -> set[int]:
        return {
            each.status_code for each in await asyncio.gather(*map(service.client.get, ["/readyz"] * times))
        }

    impatient = asyncio.create_task(service.client.get("/readyz"))
    await asyncio.sleep(0.01)
    impatient.cancel()  # takes its answer from nobody
    assert await ask(40) == await ask(40) == {200}
    assert looks == 1
    for status in (503, 200):  # an answer that is none is one as well, and for no longer
        await asyncio.sleep(0.45)
        assert await ask(40) == await ask(40) == {status}
    assert looks == 3


async def test_a_loop_that_keeps_ending_is_named_and_the_service_answers(start_service, monkeypatch) -> None:
    async def defective(*_: object) -> int:
        raise KeyError("secret")

    monkeypatch.setattr("serve_app.worker.FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("serve_app.lesions.recovery.PERIOD_S", 0.01)
    monkeypatch.setattr("serve_app.lesions.recovery.recover_once", defective)

    async def found() -> dict:
        ready = (await service.get("/readyz")).raise_for_status().json()
        return ready if ready["findings"] else {}

    async with start_service() as service:
        ready = await until(found, within_s=30)
        assert ready["findings"] == ["the loop recovery keeps ending: KeyError"]
        assert ready["loops"]["recovery"]["restarts"] >= 2
        assert "secret" not in str(ready)
        since = time.monotonic()
    assert time.monotonic() - since < 10


async def test_the_metrics_are_what_ready_says(start_service, local_stages, monkeypatch) -> None:
    monkeypatch.setattr("serve_app.http.services.COUNT_EVERY_S", 0.02)
    told: list = []
    stages = AlteredStages(local_stages(), "classify", failing(StageFailed()), calls={1})
    async with start_service(stages, observe=told.append) as service:
        assert (await service.upload(await service.care())).status_code == 202
        await until(lambda: told and told[-1]["assessments"]["pending"], within_s=30)
        ready = (await service.get("/readyz")).json()
        assert told[-1]["assessments"]["pending"] == ready["assessments"]["pending"] >= 1
        assert told[-1].keys() <= ready.keys()
        assert set(ready["loops"]) == {*LOOPS, "counts"}


async def test_ready_names_the_live_model_and_the_invariants_that_do_not_hold(service, model_id) -> None:
    services = service.app.state.services
    await services.invariants.check()
    ready = (await service.get("/readyz")).json()
    assert (ready["status"], ready["model_id"]) == ("ready", model_id)
    found = ready["invariants"]
    assert found["violated"] == []
    assert found["checked_at"].endswith("Z")
    await service.owner.execute(
        "UPDATE space_embedders SET model_id = 'another.model' WHERE embedding_space ="
        " (SELECT embedding_space FROM serving)"
    )
    await services.invariants.check()
    response = await service.get("/readyz")
    assert response.status_code == 200
    assert response.json()["invariants"]["violated"] == ["the live model filled the live space"]
    await service.owner.execute("UPDATE space_embedders SET model_id = (SELECT model_id FROM serving)")

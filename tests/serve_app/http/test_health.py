"""What /readyz and the metrics say of the loops and of what waits."""

from __future__ import annotations

import time

from serve_app.domain.errors import StageFailed
from tests.serve_app.conftest import until
from tests.serve_app.lesions.conftest import AlteredStages, failing

LOOPS = {
    *("live_model", "replica_report", "recovery", "sealing", "refusal_summaries", "invariants"),
    *("erasures", "sweeping"),
}


async def test_ready_shows_every_loop(service) -> None:
    ready = (await service.get("/readyz")).json()
    assert set(ready["loops"]) == LOOPS
    assert set(ready["audit"]) == {"checkpoint_at", "sound"}
    runs = {"running": True, "restarts": 0, "last_error": None}
    assert all(loop == runs for loop in ready["loops"].values())
    assert ready["findings"] == []


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

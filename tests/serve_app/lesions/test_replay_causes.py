"""What stands in the way of a replay: other versions, failing stages, a full service."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
import shutil
from typing import Any

import pytest

from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import replay as replayer
from serve_app.lesions.replay import Cause
from tests.serve_app.lesions.conftest import AlteredStages, failing, hang
from tests.serve_app.lesions.test_similar import ask


async def replay(service, answer: dict[str, Any]) -> dict[str, Any]:
    response = await service.replay(answer)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    service.hold_to("ReplayDocument", body)
    return body


def hold_to_cannot(body: dict[str, Any], cause: Cause) -> None:
    assert body["verdict"] == "cannot"
    assert body["cause"] == {"code": cause, "message": cause.message}
    assert body["notes"] == []


async def test_the_risk_is_drawn_from_the_recorded_references(alterable) -> None:
    async def other(answer: Awaitable[Any]) -> Any:
        found = await answer
        return replace(found, similar=found.similar[1:], malignant_share=1.0, nearest_benign=None)

    service, stages = alterable
    patient = await service.care()
    answer = (await service.upload(patient)).json()
    with stages.altered("nearest", other):
        assert (await service.upload(patient)).json()["risk"] != answer["risk"]
        body = await replay(service, answer)
    assert (body["verdict"], body["differences"]) == ("identical", [])
    assert [note["code"] for note in body["notes"]] == ["references_changed"]


async def test_a_pending_assessment_cannot_be_replayed(alterable) -> None:
    service, stages = alterable
    with stages.altered("classify", failing(StageFailed())):
        response = await service.upload(await service.care())
    assert response.status_code == 202
    body = await replay(service, response.json())
    hold_to_cannot(body, Cause.ASSESSMENT_PENDING)
    assert body["provenance"] == {"recorded": None, "current": None}


async def test_a_model_that_is_gone_or_altered_is_named(
    start_service, local_stages, models, model_id: str, tmp_path
) -> None:
    folder = tmp_path / "models" / model_id
    shutil.copytree(models / model_id, folder)
    async with start_service(local_stages(), models=tmp_path / "models") as service:
        answer = (await service.upload(await service.care())).json()
        digest = answer["provenance"]["model_digest"]
        assert (await replay(service, answer))["verdict"] == "identical"

        onnx = next(folder.glob("*.onnx"))
        content = bytearray(onnx.read_bytes())
        content[len(content) // 2] ^= 1
        onnx.write_bytes(content)
        body = await replay(service, answer)
        hold_to_cannot(body, Cause.MODEL_CHANGED)
        assert body["differences"] == [
            {"field": "provenance.model_digest", "recorded": digest, "recomputed": None}
        ]
        shutil.copy(models / model_id / onnx.name, onnx)
        with (folder / "manifest.toml").open("a") as manifest:
            manifest.write("# another\n")
        hold_to_cannot(await replay(service, answer), Cause.MODEL_CHANGED)

        shutil.rmtree(folder)
        body = await replay(service, answer)
        hold_to_cannot(body, Cause.MODEL_GONE)
        assert body["provenance"] == {"recorded": answer["provenance"], "current": None}


async def test_a_classifier_with_another_model_is_named(alterable) -> None:
    async def other(answer: Awaitable[Any]) -> Any:
        return replace(await answer, model_digest="another")

    service, stages = alterable
    answer = (await service.upload(await service.care())).json()
    with stages.altered("classify", other):
        body = await replay(service, answer)
    hold_to_cannot(body, Cause.MODEL_CHANGED)
    assert body["differences"][0]["recomputed"] == "another"


async def test_another_policy_is_named(alterable) -> None:
    service, stages = alterable
    answer = (await service.upload(await service.care())).json()
    stages.real._risk.override({})
    body = await replay(service, answer)
    stages.real._risk.override({"refusal": {"max_unknown": 1.0}})
    hold_to_cannot(body, Cause.POLICY_CHANGED)
    recorded, current = body["provenance"]["recorded"], body["provenance"]["current"]
    assert recorded == answer["provenance"]
    assert current["policy_version"] == recorded["policy_version"].partition("+")[0]
    assert [difference["field"] for difference in body["differences"]] == ["provenance.policy_version"]


async def test_an_image_that_the_limits_keep_out_now_is_named(service, start_service, local_stages) -> None:
    answer = (await service.upload(await service.care())).json()
    async with start_service(local_stages(min_side=350)) as stricter:
        body = await replay(stricter, answer)
        hold_to_cannot(body, Cause.IMAGE_REJECTED)
        assert body["differences"][0]["recomputed"] == "image_too_small"


async def test_a_stage_that_fails_is_a_problem_and_stores_nothing(alterable) -> None:
    service, stages = alterable
    answer = (await service.upload(await service.care())).json()
    before = await service.counts()
    for stage in ("prepare", "classify", "embed", "nearest", "conclude"):
        for error in (StageFailed(), Overloaded()):
            with stages.altered(stage, failing(error)):
                response = await service.replay(answer)
            service.hold_to_problem(response, 503, error.code)
            assert int(response.headers["retry-after"]) > 0
    assert {**await service.counts(), "audit_events": 0} == {**before, "audit_events": 0}
    assert (await replay(service, answer))["verdict"] == "identical"


async def test_a_replay_holds_an_uploads_deadline(alterable, monkeypatch) -> None:
    service, stages = alterable
    answer = (await service.upload(await service.care())).json()
    monkeypatch.setattr(replayer, "DEADLINE_S", 0.5)
    with stages.altered("nearest", hang):
        response = await service.replay(answer)
    service.hold_to_problem(response, 503, "stage_failed")
    (event,) = await service.events(response)
    assert (event["outcome"], event["detail"]) == ("failed", {"code": "stage_failed"})


async def test_replays_and_searches_take_an_uploads_place(start_service, local_stages) -> None:
    reached = asyncio.Event()

    async def hang_there(answer: Any) -> Any:
        reached.set()
        await hang(answer)

    stages = AlteredStages(local_stages())
    async with start_service(stages, max_uploads_in_flight=1) as service:
        patient = await service.care()
        answer = (await service.upload(patient)).json()
        for stage, first in (("prepare", service.replay(answer)), ("nearest", ask(service, answer))):
            with stages.altered(stage, hang_there):
                reached.clear()
                waiting = asyncio.create_task(first)
                await asyncio.wait_for(reached.wait(), 20)
                for response in (
                    await service.replay(answer),
                    await ask(service, answer),
                    await service.upload(patient),
                ):
                    service.hold_to_problem(response, 503, "overloaded")
                    assert int(response.headers["retry-after"]) > 0
                    assert await service.events(response) == []
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        assert (await replay(service, answer))["verdict"] == "identical"

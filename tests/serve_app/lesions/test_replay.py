"""A past answer made again: what is the same, what differs, what stands in the way, and who may ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
import json
import shutil
from typing import Any
from uuid import UUID, uuid4

import pytest

from deployments.risk.policy import site_mark
from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import replay as replayer
from serve_app.lesions.replay import MESSAGES, Cause
from serve_app.records.serving import Approval, set_operating_points
from tests.serve_app.erasure.erasing import change, damage, followed, uploaded
from tests.serve_app.lesions.conftest import AlteredStages, Held, failing, hang
from tests.serve_app.lesions.test_similar import ask


async def replay(service, answer: dict[str, Any], cause: Cause | None = None) -> dict[str, Any]:
    """Replay an answer, which cannot be done for this cause; nothing but the audit event is stored by it."""
    async with service.storing_nothing():
        response = await service.replay(answer)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    service.hold_to("ReplayDocument", body)
    assert body["tolerance"] == {"probability": 1e-6, "score": 1e-4}
    assert body["cause"] == (None if cause is None else {"code": cause, "message": MESSAGES[cause]})
    assert (body["verdict"] == "cannot") == (cause is not None)
    names = ("lesion_id", "image_id", "assessment_id", "patient_id")
    detail = {"verdict": body["verdict"]} | ({} if cause is None else {"cause": cause})
    event = await service.hold_to_event(response, "replay", "success", about=answer, names=names, **detail)
    assert event["actor"] == "dr"
    return body


def fields(body: dict[str, Any]) -> list[str]:
    return [difference["field"] for difference in body["differences"]]


async def rewrite(service, answer: dict[str, Any], path: str, value: Any) -> None:
    """Change what is on record, behind the service's back."""
    assignment = "answer = jsonb_set(answer, $2::text::text[], $3::jsonb)"
    await change(service, answer, "assessments", assignment, path, value)


async def test_a_fresh_answer_is_identical(service, drawn_lesion) -> None:
    answer = await uploaded(
        service,
        image=drawn_lesion(seed=5, kind="JPEG"),
        params={"top_k": 3, "licence": ["CC-0", "CC-BY"]},
        age_approx="62",
        sex="female",
        anatom_site_general="torso",
        history=json.dumps({"personal_melanoma": True, "immunosuppression": None}),
        checklist=json.dumps({"change_in_size": True}),
    )
    body = await replay(service, answer)
    assert body == {
        "assessment_id": answer["assessment_id"],
        "verdict": "identical",
        "cause": None,
        "tolerance": {"probability": 1e-6, "score": 1e-4},
        "differences": [],
        "notes": [],
        "provenance": {"recorded": answer["provenance"], "current": answer["provenance"]},
    }
    assert await replay(service, answer) == body


async def test_the_references_weighed_are_on_record_and_compared(service) -> None:
    answer = await uploaded(service, params={"top_k": 3, "licence": "CC-BY-NC"})
    kept = await service.owner.fetchval(
        "SELECT answer -> 'neighbours' -> 'similar' FROM assessments WHERE assessment_id = $1",
        UUID(answer["assessment_id"]),
    )
    assert (len(kept), len(answer["similar"])) == (16, 3)
    await rewrite(service, answer, "{neighbours,similar,15,isic_id}", "ISIC_0000000")
    body = await replay(service, answer)
    assert body["verdict"] == "identical"
    assert [note["code"] for note in body["notes"]] == ["references_changed"]
    # As answers were recorded when the risk was drawn from what was shown.
    shown = "answer = jsonb_set(answer, '{neighbours,similar}', answer -> 'similar') - 'similar'"
    await change(service, answer, "assessments", shown)
    timeline = await service.get(f"/api/lesions/{answer['lesion_id']}")
    (read,) = timeline.json()["assessments"]
    for part in ("similar", "neighbours", "risk"):
        assert read[part] == answer[part]
    body = await replay(service, answer)
    assert (body["verdict"], body["notes"]) == ("identical", [])


async def test_the_risk_is_drawn_from_the_recorded_references(faulty, stages) -> None:
    async def other(answer: Awaitable[Any]) -> Any:
        found = await answer
        return replace(found, similar=found.similar[1:], malignant_share=1.0, nearest_benign=None)

    answer = await uploaded(faulty)
    with stages.altered("nearest", other):
        assert (await uploaded(faulty))["risk"] != answer["risk"]
        body = await replay(faulty, answer)
    assert (body["verdict"], body["differences"]) == ("identical", [])
    assert [note["code"] for note in body["notes"]] == ["references_changed"]


async def test_a_follow_up_is_compared_with_the_same_image_again(service, drawn_lesion) -> None:
    first = await uploaded(service)
    second, third = [await followed(service, first, image=drawn_lesion(seed=seed)) for seed in (2, 3)]
    assert second["change"]["compared_image_id"] == first["image_id"]
    assert (await replay(service, third))["verdict"] == "identical"
    # As if the second image had been assessed after the third.
    await change(service, second, "lesion_images", "created_at = created_at - interval '1 hour'")
    assert (await replay(service, second))["verdict"] == "identical"
    await rewrite(service, second, "{change,similarity}", 0.25)
    body = await replay(service, second)
    assert (body["verdict"], fields(body)) == ("differs", ["change.similarity"])
    await service.owner.execute(
        "DELETE FROM lesion_embeddings WHERE image_id = $1::text::uuid", first["image_id"]
    )
    assert fields(await replay(service, second, Cause.COMPARED_IMAGE_GONE)) == ["change.compared_image_id"]


async def test_what_differs_is_named(service, answer) -> None:
    changes = {
        "{outcome}": "refused",
        "{reasons}": [{"code": "other", "message": "", "action": ""}],
        "{classification,probabilities,MEL}": 0.987,
        "{classification,prediction_set}": ["MEL", "DF"],
        "{risk,score}": 0.123,
        "{risk,factors}": [{"code": "x", "effect": "y", "message": ""}],
    }
    for path, value in changes.items():
        await rewrite(service, answer, path, value)
    body = await replay(service, answer)
    assert body["verdict"] == "differs"
    assert fields(body) == [
        *("outcome", "reasons", "probabilities.MEL", "prediction_set", "risk.score", "risk.factors")
    ]
    assert all(difference["recorded"] != difference["recomputed"] for difference in body["differences"])


async def test_a_millionth_is_tolerated(service, answer) -> None:
    probability = answer["classification"]["probabilities"]["NV"]
    for moved, verdict in ((9e-7, "within_tolerance"), (-9e-7, "within_tolerance"), (3e-6, "differs")):
        await rewrite(service, answer, "{classification,probabilities,NV}", probability + moved)
        body = await replay(service, answer)
        assert body["verdict"] == verdict
        (found,) = body["differences"]
        assert (found["recorded"], found["recomputed"]) == (probability + moved, probability)


async def test_the_sites_operating_points_are_named_and_found_again(service) -> None:
    """An answer at thresholds that were set, and taken back since, is made again at those."""
    watch, image = service.app.state.services.live, {"image": service.image}
    plain = await uploaded(service, **image)
    live = await watch.refresh()
    given = Approval(report_sha256="0" * 64)
    await set_operating_points(service.owner, live, {"melanoma": 1e-6}, given)
    try:
        live = await watch.refresh()
        strict = await uploaded(service, **image)
        codes = {factor["code"]: factor["message"] for factor in strict["risk"]["factors"]}
        assert "threshold 0.0%" in codes["melanoma"]
        assert strict["risk"]["level"] == "high"
        version = plain["provenance"]["policy_version"] + site_mark({"melanoma": 1e-6})
        assert strict["provenance"]["policy_version"] == strict["risk"]["policy_version"] == version
    finally:
        await set_operating_points(service.owner, live, {}, given)
        await watch.refresh()
    assert (await uploaded(service, **image))["risk"] == plain["risk"]
    for answer in (plain, strict):
        assert (await replay(service, answer))["verdict"] == "identical"


@pytest.mark.parametrize(
    ("version", "cause"),
    [
        ("preprocess_version", Cause.PREPROCESS_CHANGED),
        ("policy_version", Cause.POLICY_CHANGED),
        ("model_digest", Cause.MODEL_CHANGED),
        ("model_id", Cause.MODEL_GONE),
    ],
)
async def test_another_version_is_named(service, version: str, cause: Cause, answer) -> None:
    await rewrite(service, answer, f"{{provenance,{version}}}", "another")
    body = await replay(service, answer, cause)
    now = None if cause is Cause.MODEL_GONE else answer["provenance"][version]
    differs = {"field": f"provenance.{version}", "recorded": "another", "recomputed": now}
    assert body["differences"] == [differs]
    assert body["provenance"] == {
        "recorded": {**answer["provenance"], version: "another"},
        "current": answer["provenance"] if cause is Cause.POLICY_CHANGED else None,
    }


async def test_a_folder_that_was_altered_meanwhile_is_named(
    start_service, models, model_id: str, tmp_path
) -> None:
    folder = tmp_path / "models" / model_id
    shutil.copytree(models / model_id, folder)
    async with start_service(models=tmp_path / "models") as service:
        answer = await uploaded(service)
        assert (await replay(service, answer))["verdict"] == "identical"
        onnx = next(folder.glob("*.onnx"))
        content = bytearray(onnx.read_bytes())
        content[len(content) // 2] ^= 1
        onnx.write_bytes(content)
        body = await replay(service, answer, Cause.MODEL_CHANGED)
        assert body["differences"][0]["recomputed"] is None
        shutil.rmtree(folder)
        await replay(service, answer, Cause.MODEL_GONE)


async def test_a_classifier_with_another_model_is_named(faulty, stages) -> None:
    async def other(answer: Awaitable[Any]) -> Any:
        return replace(await answer, model_digest="another")

    answer = await uploaded(faulty)
    with stages.altered("classify", other):
        body = await replay(faulty, answer, Cause.MODEL_CHANGED)
    assert body["differences"][0]["recomputed"] == "another"


async def test_an_image_that_the_limits_keep_out_now_is_named(
    service, start_service, local_stages, answer
) -> None:
    async with start_service(local_stages(min_side=350)) as stricter:
        body = await replay(stricter, answer, Cause.IMAGE_REJECTED)
        assert body["differences"][0]["recomputed"] == "image_too_small"


async def test_a_pending_assessment_cannot_be_replayed(faulty, stages) -> None:
    with stages.altered("classify", failing(StageFailed())):
        response = await faulty.upload(await faulty.care())
    assert response.status_code == 202
    body = await replay(faulty, response.json(), Cause.ASSESSMENT_PENDING)
    assert body["provenance"] == {"recorded": None, "current": None}


async def test_a_stage_that_fails_or_hangs_is_a_problem_and_stores_nothing(
    faulty, stages, monkeypatch, answer
) -> None:
    before = await faulty.counts()
    for stage, error in (
        *[(stage, StageFailed()) for stage in ("prepare", "classify", "embed", "conclude")],
        ("nearest", Overloaded()),
    ):
        with stages.altered(stage, failing(error)):
            response = await faulty.replay(answer)
        faulty.hold_to_problem(response, 503, error.code)
        assert int(response.headers["retry-after"]) > 0
    monkeypatch.setattr(replayer, "DEADLINE_S", 0.5)
    with stages.altered("nearest", hang):
        response = await faulty.replay(answer)
    monkeypatch.undo()
    await faulty.hold_to_failure(response, 503, "stage_failed", "replay")
    assert {**await faulty.counts(), "audit_events": 0} == {**before, "audit_events": 0}
    assert (await replay(faulty, answer))["verdict"] == "identical"


async def test_replays_and_searches_take_an_uploads_place(start_service, local_stages) -> None:
    stages = AlteredStages(local_stages())
    async with start_service(stages, max_uploads_in_flight=1) as service:
        answer = await uploaded(service)
        for stage, first in (("prepare", service.replay(answer)), ("nearest", ask(service, answer))):
            with stages.altered(stage, held := Held()):
                waiting = asyncio.create_task(first)
                await asyncio.wait_for(held.reached.wait(), 20)
                for second in (
                    service.replay(answer),
                    ask(service, answer),
                    service.upload(answer["patient_id"]),
                ):
                    response = await second
                    service.hold_to_problem(response, 503, "overloaded")
                    assert int(response.headers["retry-after"]) > 0
                    assert await service.events(response) == []
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
        assert (await replay(service, answer))["verdict"] == "identical"


async def test_another_lesions_assessment_or_an_altered_image_is_no_answer(service) -> None:
    first, second = [await uploaded(service) for _ in range(2)]
    await damage(service, first)
    for assessment, status, code in (
        (second["assessment_id"], 404, "not_found"),
        (str(uuid4()), 404, "not_found"),
        (first["assessment_id"], 500, "integrity"),
        ("7", 422, "invalid_field"),
    ):
        response = await service.replay({**first, "assessment_id": assessment})
        service.hold_to_problem(response, status, code)
        await service.hold_to_event(response, "replay", "failed", code=code)

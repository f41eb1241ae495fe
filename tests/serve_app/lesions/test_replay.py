"""A past answer made again: what is the same, what differs, and who may ask."""

from __future__ import annotations

import io
import json
from typing import Any
from uuid import UUID, uuid4

from PIL import Image
import pytest


async def replay(service, answer: dict[str, Any]) -> dict[str, Any]:
    """Replay an answer; nothing but the audit event is stored by it."""
    before = await service.counts()
    response = await service.replay(answer)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    assert await service.counts() == {**before, "audit_events": before["audit_events"] + 1}
    body: dict[str, Any] = response.json()
    service.hold_to("ReplayDocument", body)
    assert body["assessment_id"] == answer["assessment_id"]
    assert body["tolerance"] == {"probability": 1e-6, "score": 1e-4}
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"], event["actor"]) == ("replay", "success", "dr")
    for name in ("lesion_id", "image_id", "assessment_id"):
        assert str(event[name]) == answer[name]
    assert event["patient_id"] == answer["patient_id"]
    cause = {"cause": body["cause"]["code"]} if body["cause"] else {}
    assert event["detail"] == {"verdict": body["verdict"]} | cause
    return body


async def rewrite(service, answer: dict[str, Any], path: str, value: Any) -> None:
    """Change what is on record, behind the service's back."""
    await service.owner.execute(
        "UPDATE assessments SET answer = jsonb_set(answer, $2::text::text[], $3::jsonb)"
        " WHERE assessment_id = $1::text::uuid",
        answer["assessment_id"],
        path,
        value,
    )


@pytest.mark.parametrize(("seed", "kind"), [(0, "PNG"), (5, "JPEG")])
async def test_a_fresh_answer_is_identical(service, drawn_lesion, history, seed: int, kind: str) -> None:
    fields = {"age_approx": "62", "sex": "female", "anatom_site_general": "torso", "history": history}
    checklist = json.dumps({"change_in_size": True})
    response = await service.upload(
        await service.care(),
        image=drawn_lesion(seed=seed, kind=kind),
        params={"top_k": 3, "licence": ["CC-0", "CC-BY"]},
        **fields,
        checklist=checklist,
    )
    assert response.status_code == 201, response.text
    answer = response.json()
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
    licence = await service.owner.fetchval("SELECT min(copyright_license) FROM reference_images")
    params = {"top_k": 3, "licence": licence}
    answer = (await service.upload(await service.care(), params=params)).json()
    kept = await service.owner.fetchval(
        "SELECT answer -> 'neighbours' -> 'similar' FROM assessments WHERE assessment_id = $1",
        UUID(answer["assessment_id"]),
    )
    assert len(kept) == 16
    assert len(answer["similar"]) == 3
    await rewrite(service, answer, "{neighbours,similar,15,isic_id}", "ISIC_0000000")
    body = await replay(service, answer)
    assert (body["verdict"], [note["code"] for note in body["notes"]]) == (
        "identical",
        ["references_changed"],
    )


async def test_a_record_of_only_what_was_shown_reads_and_replays_as_before(service) -> None:
    licence = await service.owner.fetchval("SELECT min(copyright_license) FROM reference_images")
    params = {"top_k": 3, "licence": licence}
    answer = (await service.upload(await service.care(), params=params)).json()
    # As answers were recorded when the risk was drawn from what was shown.
    await service.owner.execute(
        "UPDATE assessments SET answer = jsonb_set(answer, '{neighbours,similar}', answer -> 'similar') - 'similar'"
        " WHERE assessment_id = $1",
        UUID(answer["assessment_id"]),
    )
    timeline = await service.client.get(f"/api/lesions/{answer['lesion_id']}", headers=service.token("dr"))
    (read,) = timeline.json()["assessments"]
    assert [read[part] for part in ("similar", "neighbours", "risk")] == [
        answer[part] for part in ("similar", "neighbours", "risk")
    ]
    body = await replay(service, answer)
    assert (body["verdict"], body["notes"]) == ("identical", [])


async def test_a_refused_answer_is_identical(service) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, "PNG")
    answer = (await service.upload(await service.care(), image=buffer.getvalue())).json()
    assert answer["outcome"] == "refused"
    assert (await replay(service, answer))["verdict"] == "identical"


async def test_a_follow_up_is_compared_with_the_same_image_again(service, drawn_lesion) -> None:
    patient = await service.care()
    first = (await service.upload(patient)).json()
    second, third = [
        (await service.upload(patient, image=drawn_lesion(seed=seed), lesion_id=first["lesion_id"])).json()
        for seed in (2, 3)
    ]
    assert second["change"]["compared_image_id"] == first["image_id"]
    for answer in (first, second, third):
        assert (await replay(service, answer))["verdict"] == "identical"
    # As if the second image had been assessed after the third.
    await service.owner.execute(
        "UPDATE lesion_images SET created_at = created_at - interval '1 hour' WHERE image_id = $1::text::uuid",
        second["image_id"],
    )
    assert (await replay(service, second))["verdict"] == "identical"
    await rewrite(service, second, "{change,similarity}", 0.25)
    body = await replay(service, second)
    assert body["verdict"] == "differs"
    assert [difference["field"] for difference in body["differences"]] == ["change.similarity"]


async def test_a_compared_image_that_is_gone_is_named(service, drawn_lesion) -> None:
    patient = await service.care()
    first = (await service.upload(patient)).json()
    second = await service.upload(patient, image=drawn_lesion(seed=2), lesion_id=first["lesion_id"])
    await service.owner.execute(
        "DELETE FROM lesion_embeddings WHERE image_id = $1::text::uuid", first["image_id"]
    )
    body = await replay(service, second.json())
    assert (body["verdict"], body["cause"]["code"]) == ("cannot", "compared_image_gone")


async def test_what_differs_is_named(service) -> None:
    answer = (await service.upload(await service.care())).json()
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
    assert (body["verdict"], body["cause"]) == ("differs", None)
    assert [difference["field"] for difference in body["differences"]] == [
        *("outcome", "reasons", "probabilities.MEL", "prediction_set", "risk.score", "risk.factors"),
    ]
    assert all(difference["recorded"] != difference["recomputed"] for difference in body["differences"])


async def test_a_millionth_is_tolerated(service) -> None:
    answer = (await service.upload(await service.care())).json()
    probability = answer["classification"]["probabilities"]["NV"]
    for moved, verdict in ((9e-7, "within_tolerance"), (-9e-7, "within_tolerance"), (3e-6, "differs")):
        await rewrite(service, answer, "{classification,probabilities,NV}", probability + moved)
        body = await replay(service, answer)
        assert body["verdict"] == verdict
        assert body["differences"] == [
            {"field": "probabilities.NV", "recorded": probability + moved, "recomputed": probability}
        ]


async def test_another_preprocess_is_named(service) -> None:
    answer = (await service.upload(await service.care())).json()
    await rewrite(service, answer, "{provenance,preprocess_version}", "0")
    body = await replay(service, answer)
    assert (body["verdict"], body["cause"]["code"]) == ("cannot", "preprocess_changed")
    assert body["differences"] == [
        {
            "field": "provenance.preprocess_version",
            "recorded": "0",
            "recomputed": answer["provenance"]["preprocess_version"],
        }
    ]


async def test_another_lesions_assessment_is_not_found(service) -> None:
    patient = await service.care()
    first, second = [(await service.upload(patient)).json() for _ in range(2)]
    for assessment in (second["assessment_id"], str(uuid4())):
        response = await service.replay({**first, "assessment_id": assessment})
        service.hold_to_problem(response, 404, "not_found")
        (event,) = await service.events(response)
        assert (event["action"], event["outcome"]) == ("replay", "failed")
        assert event["detail"] == {"code": "not_found"}
    service.hold_to_problem(await service.replay({**first, "assessment_id": "7"}), 422, "invalid_field")


async def test_an_image_that_was_altered_is_no_answer(service) -> None:
    answer = (await service.upload(await service.care())).json()
    await service.owner.execute(
        "UPDATE lesion_images SET sealed = set_byte(sealed, 100, get_byte(sealed, 100) # 1)"
        " WHERE image_id = $1::text::uuid",
        answer["image_id"],
    )
    response = await service.replay(answer)
    service.hold_to_problem(response, 500, "integrity")
    (event,) = await service.events(response)
    assert (event["outcome"], event["detail"]) == ("failed", {"code": "integrity"})

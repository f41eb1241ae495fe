"""Another lesion under a known id, the word that it is the same one, and what the lesion still demands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import json
from typing import Any
from uuid import uuid4

from tests.serve_app.erasure.erasing import change, erase, followed, uploaded

CHECKLIST = json.dumps({"change_in_size": True, "irregular_shape": True})


@contextmanager
def asking(stages, below: float) -> Iterator[None]:
    """Question each follow-up that is less like the image before than this."""
    everything = {"refusal": {"max_unknown": 1.0}}
    review = {"same_lesion": below, "same_lesion_if_lower": below}
    stages.real._risk.override({**everything, "review": review})
    yield
    stages.real._risk.override(everything)


def codes(answer: dict[str, Any]) -> set[str]:
    return {reason["code"] for reason in answer["reasons"]}


def demand_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What is demanded while an image demands the most that there is."""
    ids = {name: answer[name] for name in ("image_id", "assessment_id")}
    return {"level": "high", "urgency": "urgent", **ids, "since": answer["created_at"]}


async def timeline(service, lesion: str) -> dict[str, Any]:
    response = await service.get(f"/api/lesions/{lesion}")
    assert response.status_code == 200, response.text
    service.hold_to("TimelineDocument", response.json())
    return response.json()


async def confirm(service, lesion: str, image: str):
    url = f"/api/lesions/{lesion}/confirm"
    return await service.client.post(url, json={"image_id": image}, headers=service.token("dr"))


async def test_two_lesions_under_one_id_are_questioned(start_service, local_stages, failing_dir) -> None:
    names = ("pub-13a-lesion-first.jpg", "pub-13b-other-lesion-second.jpg")
    first, second = [(failing_dir / name).read_bytes() for name in names]
    async with start_service(local_stages(answer_all=False)) as service:
        answer = await uploaded(service, image=first)
        follow_up = await followed(service, answer, image=second)
        again = await followed(service, answer, image=first)
        assert (follow_up["outcome"], follow_up["risk"]["level"]) == ("review", "low")
        (reason,) = [each for each in follow_up["reasons"] if each["code"] == "perhaps_another_lesion"]
        assert "similarity -0.06" in reason["message"]
        assert "confirm" in reason["action"]
        assert follow_up["open_demand"] == demand_of(answer)
        # What is questioned is not what the next one is held against.
        assert again["change"]["compared_image_id"] == answer["image_id"]
        assert "perhaps_another_lesion" not in codes(again)


async def test_a_confirmed_image_is_the_next_ones_past_and_a_questioned_one_is_not(
    faulty, stages, drawn_lesion
) -> None:
    first = await uploaded(faulty)
    with asking(stages, below=1.0):
        second = await followed(faulty, first, image=drawn_lesion(seed=3))
    assert second["outcome"] == "review"
    assert "perhaps_another_lesion" in codes(second)
    with asking(stages, below=0.0):
        third = await followed(faulty, first, image=drawn_lesion(seed=4))
        assert "perhaps_another_lesion" not in codes(third)
        assert third["change"]["compared_image_id"] == first["image_id"]
        # Confirmed late: third is newer than second.
        await change(faulty, third, "lesion_images", "created_at = created_at - interval '1 day'")
        response = await confirm(faulty, first["lesion_id"], second["image_id"])
        assert response.status_code == 200, response.text
        fourth = await followed(faulty, first, image=drawn_lesion(seed=5))
        assert fourth["change"]["compared_image_id"] == second["image_id"]
    # Its own answer stays what it was.
    with asking(stages, below=1.0):
        assert (await faulty.replay(second)).json()["verdict"] == "identical"


async def test_a_confirmation_is_audited_once_a_request_and_shown_on_its_image(faulty, answer) -> None:
    lesion, image = answer["lesion_id"], answer["image_id"]
    before = await timeline(faulty, lesion)
    assert "identity" not in before["assessments"][0]
    responses = [await confirm(faulty, lesion, image) for _ in range(2)]
    for response in responses:
        assert response.status_code == 200, response.text
        assert response.headers["cache-control"] == "no-store"
        faulty.hold_to("ConfirmationDocument", response.json())
        event = await faulty.hold_to_event(response, "confirm", "success", about=answer)
        assert event["actor"] == "dr"
    assert responses[0].json() == responses[1].json()
    after = await timeline(faulty, lesion)
    identity = after["assessments"][0].pop("identity")
    assert identity == responses[0].json()["identity"]
    assert identity["confirmed_by"] == "dr"
    assert after == before


async def test_what_cannot_be_confirmed_is_a_clear_problem_on_record(faulty) -> None:
    one, other = [await uploaded(faulty) for _ in range(2)]
    for image in (other["image_id"], str(uuid4())):
        response = await confirm(faulty, one["lesion_id"], image)
        faulty.hold_to_problem(response, 404, "not_found")
        await faulty.hold_to_event(response, "confirm", "failed")
    url = f"/api/lesions/{one['lesion_id']}/confirm"
    for body in ({}, {"image_id": "7"}, {"image_id": one["image_id"], "why": "x"}):
        response = await faulty.client.post(url, json=body, headers=faulty.token("dr"))
        faulty.hold_to_problem(response, 422, "invalid_field")
    assert (await erase(faulty, one)).status_code == 200
    faulty.hold_to_problem(await confirm(faulty, one["lesion_id"], one["image_id"]), 410, "erased")


async def test_an_image_of_another_models_space_could_not_be_checked(faulty) -> None:
    first = await uploaded(faulty)
    await faulty.owner.execute("INSERT INTO embedding_spaces VALUES ('of.before') ON CONFLICT DO NOTHING")
    await change(faulty, first, "lesion_embeddings", "embedding_space = 'of.before'")
    second = await followed(faulty, first)
    assert second["change"]["similarity"] is None
    assert second["outcome"] == "review"
    assert "identity_not_checked" in codes(second)
    assert (await faulty.replay(second)).json()["verdict"] == "identical"
    third = await followed(faulty, first)
    assert third["change"]["compared_image_id"] == second["image_id"]
    assert "identity_not_checked" not in codes(third)


async def test_no_later_image_hides_what_an_earlier_one_demands(faulty, stages) -> None:
    first = await uploaded(faulty, checklist=CHECKLIST)
    demand = demand_of(first)
    assert first["open_demand"] == demand
    plain, repeated = [await followed(faulty, first, headers={"Idempotency-Key": "later"}) for _ in range(2)]
    refusing = {"refusal": {"max_unknown": 0.0}, "review": {"max_unknown": 0.0}}
    stages.real._risk.override({**refusing, "rules": {"unknown": {"threshold": 0.0}}})
    refused = await followed(faulty, first)
    alone, checked = await uploaded(faulty), await uploaded(faulty, checklist=CHECKLIST)
    stages.real._risk.override({"refusal": {"max_unknown": 1.0}})
    # Of a refused image, what its checklist demands stands.
    assert (alone["outcome"], alone["open_demand"], checked["risk"]) == ("refused", None, None)
    assert checked["open_demand"] == demand_of(checked)
    assert refused["outcome"] == "refused"
    for later in (plain, repeated, refused):
        assert later["open_demand"] == demand
        faulty.hold_to("AssessmentDocument", later)
    assert plain["risk"]["level"] != "high"
    assert (await erase(faulty, first)).status_code == 200
    assert (await timeline(faulty, first["lesion_id"]))["open_demand"] == demand
    listed = await faulty.get("/api/lesions", params={"patient_id": first["patient_id"]})
    faulty.hold_to("LesionListDocument", listed.json())
    (entry,) = listed.json()["lesions"]
    assert entry["open_demand"] == demand

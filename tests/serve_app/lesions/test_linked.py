"""Two lesions that are one, over HTTP: what is taken and refused, what is shown of both, and what an unlink gives back."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from serve_app.domain.errors import StageFailed
from tests.serve_app.erasure.erasing import end_leases, erase, followed, recover
from tests.serve_app.lesions.conftest import failing

SITE = {"anatom_site_general": "posterior torso"}
AT = {"view": "posterior", "x": "0.25", "y": "0.5"}


async def link(service, later: dict[str, Any], earlier: Any, *, headers: Any = None, **body: Any) -> Any:
    url = f"/api/lesions/{later['lesion_id']}/link"
    said = {"earlier_lesion_id": earlier["lesion_id"], "reason": "images_compared", **body}
    return await service.client.post(url, json=said, headers=service.token("dr") | (headers or {}))


async def unlink(service, later: dict[str, Any], *, headers: Any = None, **body: Any) -> Any:
    url = f"/api/lesions/{later['lesion_id']}/unlink"
    said = {"reason": "entered_in_error", **body}
    return await service.client.post(url, json=said, headers=service.token("dr") | (headers or {}))


async def timeline(service, answer: dict[str, Any]) -> dict[str, Any]:
    response = await service.get(f"/api/lesions/{answer['lesion_id']}")
    service.hold_to("TimelineDocument", response.json())
    found: dict[str, Any] = response.json()
    return found


async def decide(service, answer: dict[str, Any]) -> None:
    url, body = f"/api/lesions/{answer['lesion_id']}/reviews", {"assessment_id": answer["assessment_id"]}
    said = await service.client.post(url, json=body | {"decision": "accept"}, headers=service.token("dr"))
    assert said.status_code == 201, said.text


@pytest.fixture
async def two(service, drawn_lesion) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers to the first images of two lesions of a patient, the earlier one first."""
    patient = await service.care()
    answers = [(await service.upload(patient, image=drawn_lesion(seed), **SITE)).json() for seed in (1, 2)]
    return answers[0], answers[1]


async def test_linked_they_are_shown_as_one_and_unlinked_as_they_were(service, two, drawn_lesion) -> None:
    early, late = two
    for answer in two:
        await decide(service, answer)
    alone = [await timeline(service, answer) for answer in two]
    later = {"image": drawn_lesion(3)}
    response = await link(service, late, early)
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/api/lesions/{late['lesion_id']}"
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    service.hold_to("LinkedDocument", body)
    made = body["link"]
    named = {"lesion_id": late["lesion_id"], "earlier_lesion_id": early["lesion_id"]}
    assert {name: made[name] for name in named} == named
    assert (made["linked_by"], made["reason"], made["ended_at"]) == ("dr", "images_compared", None)
    detail = {
        "reason": "images_compared",
        "link_id": made["link_id"],
        "earlier_lesion_id": early["lesion_id"],
    }
    event = await service.hold_to_event(
        response, "link", "success", about=late, names=("patient_id", "lesion_id"), **detail
    )
    assert list(event["rows"]) == ["lesion_links"]
    for answer, other in ((early, late), (late, early)):
        found = await timeline(service, answer)
        assert (found["lesion_id"], found["created_at"]) == (answer["lesion_id"], answer["created_at"])
        assert found["links"] == [made]
        assert "likeliest_lesion" not in found
        shown = {each["image_id"]: each["lesion_id"] for each in found["assessments"]}
        assert shown == {each["image_id"]: each["lesion_id"] for each in two}
        # Each is asked about where it is filed.
        wrong = await service.get(f"/api/lesions/{answer['lesion_id']}/images/{other['image_id']}")
        service.hold_to_problem(wrong, 404, "not_found")
    # What comes next, under either, is compared with the newest of both.
    third = await followed(service, early, **later)
    assert third["change"]["compared_image_id"] == late["image_id"]
    assert third["lesion_id"] == early["lesion_id"]
    response = await unlink(service, late)
    assert response.status_code == 200, response.text
    service.hold_to("LinkedDocument", response.json())
    ended = response.json()["link"]
    assert (ended["ended_by"], ended["end_reason"]) == ("dr", "entered_in_error")
    assert {name: ended[name] for name in ("link_id", "reason", "linked_at")} == {
        name: made[name] for name in ("link_id", "reason", "linked_at")
    }
    detail["reason"] = "entered_in_error"
    await service.hold_to_event(
        response, "unlink", "success", about=late, names=("patient_id", "lesion_id"), **detail
    )
    # The answer stays as it is, and is made again although what it was compared with is another lesion's now.
    assert (await service.replay(third)).json()["verdict"] == "identical"
    fourth = await followed(service, late, **later)
    assert fourth["change"]["compared_image_id"] == late["image_id"]
    for answer in (third, fourth):
        assert (await erase(service, answer)).status_code == 200
    for answer, before in zip(two, alone, strict=True):
        found = await timeline(service, answer)
        assert found.pop("links") == [ended]
        before.pop("likeliest_lesion", None)
        (same,) = [each for each in found["assessments"] if each["image_id"] == answer["image_id"]]
        assert [same] == before["assessments"]
        assert {each["lesion_id"] for each in found["assessments"]} == {answer["lesion_id"]}
    # The image that it was compared with gone, the answer cannot be made again.
    again = await followed(service, early, **later)
    assert (await service.replay(again)).json()["verdict"] == "identical"


async def test_the_list_names_the_first_and_the_report_tells_of_both(service, two) -> None:
    early, late = two
    await link(service, late, early)
    listed = (await service.get("/api/lesions", params={"patient_id": early["patient_id"]})).json()
    service.hold_to("LesionListDocument", listed)
    assert [each["linked_to"] for each in listed["lesions"]] == [early["lesion_id"], None]
    bundle = (await service.get(f"/api/lesions/{early['lesion_id']}/report")).json()
    parts = [each["resource"] for each in bundle["entry"]]
    (body_part,) = [each for each in parts if each["resourceType"] == "BodyStructure"]
    assert {each["value"] for each in body_part["identifier"]} == {each["lesion_id"] for each in two}
    media = {each["content"]["url"] for each in parts if each["resourceType"] == "Media"}
    assert media == {f"/api/lesions/{each['lesion_id']}/images/{each['image_id']}" for each in two}


async def test_a_replay_after_the_erasure_of_a_linked_image_says_so(service, two, drawn_lesion) -> None:
    early, late = two
    await link(service, late, early)
    third = await followed(service, late, image=drawn_lesion(5))
    assert third["change"]["compared_image_id"] == late["image_id"]
    await erase(service, late)
    fourth = await followed(service, late, image=drawn_lesion(6))
    assert fourth["change"]["compared_image_id"] == third["image_id"]
    assert (await service.replay(fourth)).json()["verdict"] == "identical"
    cannot = (await service.replay(third)).json()
    assert (cannot["verdict"], cannot["cause"]["code"]) == ("cannot", "compared_image_gone")


async def test_no_demand_is_hidden_by_a_link_and_each_keeps_the_higher_of_both(service, two) -> None:
    early, late = two
    # Of this patient alone.
    subject = f"dr-{uuid4().hex[:8]}"
    asked = {"params": {"kind": "demand"}, "headers": service.token(subject)}
    await service.care(subject, early["patient_id"])

    async def open_of(answer: dict[str, Any]) -> dict[str, Any] | None:
        found: dict[str, Any] | None = (await timeline(service, answer))["open_demand"]
        return found

    async def listed() -> list[str]:
        items = (await service.client.get("/api/worklist", **asked)).json()["items"]
        return [each["image_id"] for each in items]

    demands = [await open_of(answer) for answer in two]
    assert all("lesion_id" not in demand for demand in demands)
    body = (await link(service, late, early)).json()
    highest = body["open_demand"]
    ranks = {"low": 0, "medium": 1, "high": 2}
    assert all(ranks[highest["level"]] >= ranks[demand["level"]] for demand in demands)
    assert len(await listed()) == 1
    filed = {answer["image_id"]: answer for answer in two}
    first = filed[highest["image_id"]]
    assert highest.get("lesion_id") == (None if first is late else early["lesion_id"])
    other = late if first is early else early
    assert (await open_of(other))["lesion_id"] == first["lesion_id"]
    # Decided on where it is filed; then the other one's own waits.
    wrong = f"/api/lesions/{other['lesion_id']}/reviews"
    said = {"assessment_id": first["assessment_id"], "decision": "accept"}
    refused = await service.client.post(wrong, json=said, headers=service.token("dr"))
    service.hold_to_problem(refused, 404, "not_found")
    left = (await unlink(service, late)).json()["open_demand"]
    assert left["image_id"] == highest["image_id"]
    assert sorted(await listed()) == sorted(filed)
    await decide(service, first)
    assert (await open_of(other))["image_id"] == other["image_id"]
    assert await open_of(first) is None or (await open_of(first))["image_id"] == other["image_id"]
    await decide(service, other)
    assert [await open_of(answer) for answer in two] == [None, None]
    assert await listed() == []


async def test_what_cannot_be_linked_is_a_clear_problem_on_record(service, two, drawn_lesion) -> None:
    early, late = two
    third = (await service.upload(early["patient_id"], image=drawn_lesion(4))).json()
    stranger = (await service.upload(await service.care())).json()
    hidden = await service.upload(await service.care("another"), subject="another")
    for earlier in (stranger, hidden.json(), {"lesion_id": str(uuid4())}):
        response = await link(service, late, earlier)
        problem = await service.hold_to_failure(response, 404, "not_found", "link")
        # The same words, whether it is another's, or none.
        assert problem["detail"] == "earlier_lesion_id: this patient has no such lesion."
    for body in ({"reason": "because"}, {"reason": None}, {"earlier_lesion_id": "7"}, {"note": "x"}):
        response = await link(service, late, early, **body)
        await service.hold_to_failure(response, 422, "invalid_field", "link")
    for pair in ((early, late), (late, late)):
        await service.hold_to_failure(await link(service, *pair), 409, "conflict", "link")
    await service.hold_to_failure(await unlink(service, late), 409, "conflict", "unlink")
    assert (await link(service, third, late)).status_code == 201
    # No chain: neither onward from what others are linked to, nor to what is linked itself.
    for pair in ((third, late), (third, early), (late, early)):
        await service.hold_to_failure(await link(service, *pair), 409, "conflict", "link")
    assert (await unlink(service, third)).status_code == 200
    assert (await link(service, late, early)).status_code == 201
    problem = await service.hold_to_failure(await link(service, third, late), 409, "conflict", "link")
    assert "linked itself" in problem["detail"]
    assert (await link(service, third, early)).status_code == 201
    assert len((await timeline(service, late))["assessments"]) == 3
    for roles in (("pms_service",), ("supervisor",), ("auditor",)):
        for say in (
            link(service, late, early, headers=service.token("dr", roles)),
            unlink(service, late, headers=service.token("dr", roles)),
        ):
            response = await say
            service.hold_to_problem(response, 403, "forbidden")


async def test_a_key_and_a_body_lead_to_one_link(service, two) -> None:
    early, late = two
    key = {"Idempotency-Key": str(uuid4())}
    first, again = [await link(service, late, early, headers=key) for _ in range(2)]
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json()
    await service.hold_to_event(again, "read", "success", repeated="link")
    other = await link(service, late, early, headers=key, reason="other")
    service.hold_to_problem(other, 422, "idempotency_mismatch")
    crossed = await unlink(service, late, headers=key)
    service.hold_to_problem(crossed, 422, "idempotency_mismatch")
    key = {"Idempotency-Key": str(uuid4())}
    first, again = [await unlink(service, late, headers=key) for _ in range(2)]
    assert (first.status_code, first.json()) == (200, again.json())
    await service.hold_to_event(again, "read", "success", repeated="unlink")


async def test_a_new_lesion_is_asked_about_and_never_linked_by_itself(service, drawn_lesion) -> None:
    """The likeliest earlier one at its site; no follow-up is, nor one at another site, nor one that was linked."""
    patient, image = await service.care(), drawn_lesion(1)
    first = (await service.upload(patient, image=image, **SITE, **AT)).json()
    elsewhere = await service.upload(patient, image=image, anatom_site_general="upper extremity")
    assert all("likeliest_lesion" not in each for each in (first, elsewhere.json()))
    followed_up = await followed(service, first, image=image, **SITE)
    assert "likeliest_lesion" not in followed_up
    await service.upload(await service.care(), image=image, **SITE)  # another patient's
    new = (await service.upload(patient, image=image, **SITE, view="posterior", x="0.28", y="0.54")).json()
    service.hold_to("AssessmentDocument", new)
    asked = new["likeliest_lesion"]
    assert (asked["lesion_id"], asked["image_id"]) == (first["lesion_id"], first["image_id"])
    assert asked["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert asked["distance"] == pytest.approx(0.05, abs=1e-6)
    assert (await timeline(service, new))["likeliest_lesion"] == asked
    assert "links" not in await timeline(service, new)
    # What was asked about is no other lesion's matter.
    assert "likeliest_lesion" not in await timeline(service, first)
    assert (await link(service, new, {"lesion_id": asked["lesion_id"]})).status_code == 201
    assert "likeliest_lesion" not in await timeline(service, new)
    await unlink(service, new)
    assert "likeliest_lesion" not in await timeline(service, new)
    await erase(service, new)
    assert "likeliest_lesion" not in await timeline(service, new)


async def test_of_an_answer_that_comes_later_the_timeline_asks(faulty, stages, drawn_lesion) -> None:

    patient, image = await faulty.care(), drawn_lesion(1)
    first = (await faulty.upload(patient, image=image, **SITE)).json()
    with stages.altered("conclude", failing(StageFailed("x"))):
        pending = await faulty.upload(patient, image=image, **SITE)
    assert (pending.status_code, "likeliest_lesion" in pending.json()) == (202, False)
    assert "likeliest_lesion" not in await timeline(faulty, pending.json())
    await end_leases(faulty)
    await recover(faulty)
    asked = (await timeline(faulty, pending.json()))["likeliest_lesion"]
    assert asked["lesion_id"] == first["lesion_id"]


async def test_a_position_is_kept_shown_with_its_image_and_erased_with_it(service) -> None:
    patient = await service.care()
    answer = (await service.upload(patient, **AT)).json()
    service.hold_to("AssessmentDocument", answer)
    position = {"view": "posterior", "x": 0.25, "y": 0.5}
    assert answer["position"] == position
    (shown,) = (await timeline(service, answer))["assessments"]
    assert shown["position"] == position
    plain = await followed(service, answer)
    assert "position" not in plain
    assert (await service.replay(answer)).json()["verdict"] == "identical"
    await erase(service, answer)
    assert all("position" not in each for each in (await timeline(service, answer))["assessments"])


@pytest.mark.parametrize(
    "fields",
    [
        *({name: value for name, value in AT.items() if name != left} for left in AT),
        *(
            {**AT, name: value}
            for name in "xy"
            for value in ("-0.1", "1.1", "1.0001", "0.12345", "nan", ".5", "1e-1", "٠")
        ),
        {**AT, "view": "back"},
        {"x": "0.5"},
    ],
    ids=str,
)
async def test_what_is_no_position_is_refused(service, fields) -> None:
    async with service.storing_nothing():
        response = await service.upload(await service.care(), **fields)
        await service.hold_to_failure(response, 422, "invalid_field", "upload")


async def test_the_ends_of_a_view_are_in_it(service) -> None:
    answer = (await service.upload(await service.care(), view="left_lateral", x="0", y="1.0000")).json()
    assert answer["position"] == {"view": "left_lateral", "x": 0.0, "y": 1.0}

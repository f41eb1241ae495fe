"""A clinician's word over HTTP: what is taken, what is refused and why, where it is seen, and what of it is erased."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from tests.serve_app.erasure.erasing import erase, followed, uploaded

TODAY = datetime.now(UTC).date()
OUTCOME = {
    "kind": "histology",
    "diagnosis": "MEL",
    "code": "8720/3",
    "code_system": "urn:oid:2.16.840.1.113883.6.43.1",
    "observed_on": "2026-06-01",
    "source": "pathology_report",
}


async def say(
    service, answer: dict[str, Any], body: dict[str, Any], what: str = "reviews", **named: Any
) -> Any:
    """Say something of a lesion, as its clinician."""
    url = f"/api/lesions/{named.pop('lesion_id', answer['lesion_id'])}/{what}"
    headers = service.token(named.pop("subject", "dr")) | named.pop("headers", {})
    body = {"assessment_id": answer["assessment_id"], **body} if what == "reviews" else body
    return await service.client.post(url, json=body, headers=headers)


async def timeline(service, answer: dict[str, Any]) -> dict[str, Any]:
    response = await service.get(f"/api/lesions/{answer['lesion_id']}")
    service.hold_to("TimelineDocument", response.json())
    found: dict[str, Any] = response.json()
    return found


async def test_an_accepted_answer_closes_the_demand_and_stays_as_it_is(service, answer) -> None:
    before = await timeline(service, answer)
    assert (before["open_demand"] is None, before["outcomes"]) == (False, [])
    body = {
        "decision": "accept",
        "referral_made": True,
        "follow_up_by": str(TODAY),
        "note": "seen with the patient",
    }
    response = await say(service, answer, body)
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/api/lesions/{answer['lesion_id']}"
    service.hold_to("ReviewedDocument", response.json())
    review = response.json()["review"]
    assert response.json()["open_demand"] is None
    risk = answer["risk"]
    assert {name: review[name] for name in ("level", "urgency")} == {
        name: risk[name] for name in ("level", "urgency")
    }
    assert (review["clinician"], review["image_id"]) == ("dr", answer["image_id"])
    assert review["answers"] == [answer["assessment_id"]]
    assert {name: review[name] for name in body} == body
    names = ("patient_id", "lesion_id", "image_id", "assessment_id")
    event = await service.hold_to_event(
        response, "review", "success", about=answer, names=names, decision="accept"
    )
    assert "seen" not in str(event["detail"])
    after = await timeline(service, answer)
    assert after["open_demand"] is None
    (shown,) = after["assessments"]
    assert shown.pop("reviews") == [review]
    assert [shown] == before["assessments"]
    # A later image has a demand of its own.
    later = await followed(service, answer)
    assert later["open_demand"]["assessment_id"] == later["assessment_id"]


async def test_a_decision_may_be_lower_and_says_why(service, answer) -> None:
    body = {"decision": "override", "reason": "dermoscopic_features", "diagnosis": "NV", "level": "low"}
    response = await say(service, answer, body)
    assert response.status_code == 201, response.text
    review = response.json()["review"]
    assert {name: review[name] for name in body} == body
    assert (review["urgency"], response.json()["open_demand"]) == (None, None)
    listed = (await service.get("/api/lesions", params={"patient_id": answer["patient_id"]})).json()
    assert listed["lesions"][0]["latest"]["risk"]["level"] == answer["risk"]["level"]


async def test_an_impression_closes_nothing_and_says_whether_it_came_first(service) -> None:
    patient = await service.care("nurse")
    await service.care("dr", patient)
    answer = (await service.upload(patient, subject="nurse")).json()
    thought = {"impression": {"diagnosis": "MEL", "intended_referral": "urgent"}}
    first = (await say(service, answer, thought)).json()
    assert first["review"]["impression"]["before_answer"] is True
    assert (first["review"]["decision"], first["review"]["answers"]) == (None, [])
    assert first["open_demand"]["assessment_id"] == answer["assessment_id"]
    second = (await say(service, answer, {**thought, "decision": "accept"})).json()["review"]
    assert (second["impression"]["before_answer"], second["decision"]) == (False, "accept")
    uploader = (await say(service, answer, thought, subject="nurse")).json()["review"]
    assert uploader["impression"]["before_answer"] is False
    (shown,) = (await timeline(service, answer))["assessments"]
    assert [each["clinician"] for each in shown["reviews"]] == ["dr", "dr", "nurse"]


OVERRIDE = {"decision": "override", "reason": "other", "level": "low"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, "decision"),
        ({"decision": "maybe"}, "decision"),
        ({"decision": "accept", "level": "low"}, "level"),
        ({"decision": "accept", "reason": "other"}, "reason"),
        ({"decision": "override", "level": "low"}, "reason"),
        ({"decision": "override", "reason": "other"}, "diagnosis, level or urgency"),
        ({**OVERRIDE, "reason": "because"}, "reason"),
        ({**OVERRIDE, "level": "none"}, "level"),
        ({**OVERRIDE, "follow_up_by": str(TODAY - timedelta(days=2))}, "passed"),
        ({**OVERRIDE, "follow_up_by": 1e9}, "YYYY-MM-DD"),
        ({**OVERRIDE, "follow_up_by": "2031-02-30"}, "YYYY-MM-DD"),
        ({**OVERRIDE, "follow_up_by": "2031-W05-1"}, "YYYY-MM-DD"),
        ({**OVERRIDE, "follow_up_by": f"{TODAY.year + 11}-01-01"}, "ten years"),
        ({**OVERRIDE, "referral_made": "yes"}, "referral_made"),
        ({**OVERRIDE, "note": ""}, "note"),
        ({**OVERRIDE, "note": "x" * 1001}, "note"),
        ({**OVERRIDE, "note": "a\0"}, "note"),
        ({**OVERRIDE, "note": "\x9b31m"}, "note"),
        ({"note": "no decision"}, "note"),
        ({"impression": {}}, "impression"),
        ({"impression": {"diagnosis": "XYZ"}}, "impression.diagnosis"),
        ({"impression": {"diagnosis": "NV"}, "level": "low"}, "level"),
        ({"decision": "accept", "assessment_id": "x"}, "assessment_id"),
        ({"decision": "accept", "before_answer": True}, "before_answer"),
        ({"decision": "accept", "impression": {"diagnosis": "NV", "before_answer": True}}, "before_answer"),
    ],
    ids=str,
)
async def test_what_is_no_review_is_refused_by_name(service, answer, body, named) -> None:
    response = await say(service, answer, body)
    problem = await service.hold_to_failure(response, 422, "invalid_field", "review")
    assert named in problem["detail"]
    assert (await timeline(service, answer))["open_demand"] is not None


async def test_a_review_is_of_an_answer_of_this_lesion(service, answer) -> None:
    other = await uploaded(service)
    for body in ({"assessment_id": other["assessment_id"]}, {"assessment_id": str(uuid4())}):
        response = await say(service, answer, {"decision": "accept", **body})
        await service.hold_to_failure(response, 404, "not_found", "review")
    for outcome, status, code in (("pending", 409, "assessment_pending"), ("failed", 409, "conflict")):
        await service.owner.execute(
            "UPDATE assessments SET outcome = $2, answer = NULL,"
            " failure = CASE $2 WHEN 'failed' THEN 'integrity' END,"
            " completed_at = CASE $2 WHEN 'failed' THEN now() END WHERE assessment_id = $1::text::uuid",
            *(other["assessment_id"], outcome),
        )
        response = await say(service, other, {"decision": "accept"})
        await service.hold_to_failure(response, status, code, "review")
        thought = await say(service, other, {"impression": {"diagnosis": "NV"}})
        assert thought.status_code == (201 if outcome == "pending" else 409), thought.text


async def test_an_erased_image_keeps_what_was_said_without_a_note_and_takes_a_decision_alone(
    service, answer
) -> None:
    said = {"decision": "accept", "note": "Mrs Marker's left arm"}
    review = (await say(service, answer, said)).json()["review"]
    outcome = await say(service, answer, {**OUTCOME, "image_id": answer["image_id"]}, "outcomes")
    assert outcome.status_code == 201, outcome.text
    assert (await erase(service, answer)).status_code == 200
    for body, what, action in (
        ({"decision": "accept", "note": "her left arm"}, "reviews", "review"),
        ({"decision": "accept", "impression": {"diagnosis": "NV"}}, "reviews", "review"),
        ({"impression": {"diagnosis": "NV"}}, "reviews", "review"),
        ({**OUTCOME, "image_id": answer["image_id"]}, "outcomes", "record_outcome"),
    ):
        response = await say(service, answer, body, what)
        await service.hold_to_failure(response, 410, "erased", action)
    told = await timeline(service, answer)
    (shown,) = told["assessments"]
    assert shown["reviews"] == [review | {"note": None}]
    assert told["outcomes"] == [outcome.json()]
    assert "Marker" not in str(told)
    kept = "SELECT count(*) FROM audit_events WHERE detail::text LIKE '%Marker%'"
    assert await service.owner.fetchval(kept) == 0
    # What it demanded is not gone with it, and can be decided on anew.
    again = (await say(service, answer, {"decision": "accept"})).json()["review"]
    assert (again["level"], again["urgency"], again["answers"]) == (review["level"], review["urgency"], [])
    # What the lesion was may become known when its image is gone.
    assert (await say(service, answer, OUTCOME, "outcomes")).status_code == 201


async def test_a_note_may_have_lines_of_any_system(service, answer) -> None:
    note = "seen with the patient\r\nand again\n\tלא"
    review = (await say(service, answer, {"decision": "accept", "note": note})).json()["review"]
    assert review["note"] == note


async def test_outcomes_add_up_and_close_no_demand(service, answer) -> None:
    first = await say(service, answer, {**OUTCOME, "image_id": answer["image_id"]}, "outcomes")
    assert first.status_code == 201, first.text
    service.hold_to("LesionOutcomeDocument", first.json())
    assert first.json().items() >= {**OUTCOME, "malignant": True, "image_id": answer["image_id"]}.items()
    await service.hold_to_event(first, "record_outcome", "success", about=answer, kind="histology")
    body = {"kind": "follow_up", "malignant": False, "observed_on": str(TODAY), "source": "clinician"}
    second = await say(service, answer, body, "outcomes")
    assert second.json()["diagnosis"] is None
    told = await timeline(service, answer)
    assert told["outcomes"] == [first.json(), second.json()]
    assert told["open_demand"] is not None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"diagnosis": "UNK"}, "diagnosis"),
        ({"diagnosis": None}, "malignant"),
        ({"observed_on": "0026-06-01"}, "1900"),
        ({"malignant": False}, "MEL is malignant"),
        ({"diagnosis": "NV", "malignant": True}, "NV is not malignant"),
        ({"code": None}, "code_system"),
        ({"code": "two words"}, "code"),
        ({"code_system": "not a uri"}, "code_system"),
        ({"code_system": "urn:derm-cds:diagnosis", "code": "NV"}, "code_system"),
        ({"code_system": "URN:Derm-CDS:diagnosis", "code": "NV"}, "code_system"),
        ({"observed_on": str(TODAY + timedelta(days=2))}, "yet to come"),
        ({"observed_on": None}, "observed_on"),
        ({"kind": "hearsay"}, "kind"),
        ({"source": "neighbour"}, "source"),
        ({"image_id": "x"}, "image_id"),
        ({"recorded_by": "me"}, "recorded_by"),
    ],
    ids=str,
)
async def test_what_is_no_outcome_is_refused_by_name(service, answer, changed, named) -> None:
    response = await say(service, answer, {**OUTCOME, **changed}, "outcomes")
    problem = await service.hold_to_failure(response, 422, "invalid_field", "record_outcome")
    assert named in problem["detail"]


async def test_an_outcome_is_of_an_image_of_this_lesion(service, answer) -> None:
    other = await uploaded(service)
    response = await say(service, answer, {**OUTCOME, "image_id": other["image_id"]}, "outcomes")
    await service.hold_to_failure(response, 404, "not_found", "record_outcome")


@pytest.mark.parametrize(
    ("what", "action", "body"),
    [("reviews", "review", {"decision": "accept"}), ("outcomes", "record_outcome", OUTCOME)],
)
async def test_the_same_key_and_body_is_one_word(service, answer, what, action, body) -> None:
    headers = {"Idempotency-Key": f"key-{uuid4()}"}
    first = await say(service, answer, body, what, headers=headers)
    assert first.status_code == 201, first.text
    again = await say(service, answer, body, what, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    event = await service.hold_to_event(again, "read", "success", repeated=action)
    assert event["actor"] == "dr"
    for changed in (
        await say(
            service,
            answer,
            body | {"source": "registry"} if what == "outcomes" else OVERRIDE,
            what,
            headers=headers,
        ),
        await say(service, await uploaded(service), body, what, headers=headers),
    ):
        await service.hold_to_failure(changed, 422, "idempotency_mismatch", action)
    upload = await service.upload(answer["patient_id"], headers=headers)
    await service.hold_to_failure(upload, 422, "idempotency_mismatch", "upload")
    bad = await say(service, answer, body, what, headers={"Idempotency-Key": "two words"})
    await service.hold_to_failure(bad, 422, "invalid_field", action)


async def test_a_stranger_learns_nothing_of_what_a_review_would_need(service, answer) -> None:
    responses = [
        await say(service, answer, body, what, subject=f"dr-{uuid4().hex[:8]}", lesion_id=lesion)
        for lesion in (answer["lesion_id"], str(uuid4()))
        for what, body in (("reviews", {"decision": "accept"}), ("reviews", {"x": 1}), ("outcomes", {}))
    ]
    bodies = [service.hold_to_problem(response, 403, "forbidden") for response in responses]
    assert len({body["detail"] for body in bodies}) == 1


async def test_what_an_erased_image_demanded_is_answered_by_a_decision(service, answer) -> None:
    demanded = (await timeline(service, answer))["open_demand"]
    assert (await erase(service, answer, reason="wrong_patient")).status_code == 200
    assert (await timeline(service, answer))["open_demand"] == demanded
    said = {
        "decision": "override",
        "reason": "image_not_representative",
        "level": "low",
        "urgency": "routine",
    }
    response = await say(service, answer, said)
    assert response.status_code == 201, response.text
    reviewed = response.json()
    assert reviewed["review"]["answers"] == [answer["assessment_id"]]
    assert reviewed["open_demand"] is None is (await timeline(service, answer))["open_demand"]

"""What an upload says beside what is weighed: skin type, device, the clinician's impression. None changes an answer."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest

from serve_app.domain.patient import ClinicalContext, SkinType
from serve_app.records.assessment_json import context_to_json
from tests.serve_app.erasure.erasing import erase, row, uploaded

IMPRESSION = {"diagnosis": "BCC", "intended_referral": "routine"}
DESCRIBED = {"skin_type": "V", "device": "DermLite DL5 + iPhone 14", "impression": json.dumps(IMPRESSION)}
POSITION = {"view": "anterior", "x": "0.5", "y": "0.1"}
#: What of an answer is its own, whatever is in it.
OWN = {
    "assessment_id",
    "lesion_id",
    "image_id",
    "patient_id",
    "created_at",
    "timings_ms",
    "open_demand",
    "position",
}


def said(answer: dict[str, Any]) -> dict[str, Any]:
    demand = answer["open_demand"] and {name: answer["open_demand"][name] for name in ("level", "urgency")}
    return {name: value for name, value in answer.items() if name not in OWN} | {"demand": demand}


async def reviews(service, answer: dict[str, Any]) -> list[dict[str, Any]]:
    found = await service.owner.fetch(
        "SELECT * FROM reviews WHERE assessment_id = $1::text::uuid", answer["assessment_id"]
    )
    return [dict(each) for each in found]


@pytest.mark.parametrize(
    "described", [{name: DESCRIBED[name]} for name in DESCRIBED] + [DESCRIBED, POSITION], ids=str
)
async def test_the_answer_is_the_same_to_the_bit_with_and_without(service, described) -> None:
    """Of a patient about whom much is weighed: nothing of it shifts."""
    fields = {"age_approx": "67", "anatom_site_general": "head/neck", "checklist": '{"oozing": true}'}
    plain, told = await uploaded(service, **fields), await uploaded(service, **fields, **described)
    assert said(told) == said(plain)
    assert (await service.replay(told)).json()["verdict"] == "identical"


async def test_what_describes_is_on_record_and_goes_with_the_image(service) -> None:
    answer = await uploaded(service, **DESCRIBED)
    context = (await row(service, answer))["context"]
    assert (context["skin_type"], context["device"]) == ("V", "DermLite DL5 + iPhone 14")
    await erase(service, answer)
    assert (await row(service, answer))["context"] == {}
    # The clinician's word on the assessment stays.
    assert len(await reviews(service, answer)) == 1


def test_a_context_that_does_not_state_them_is_written_as_before() -> None:
    """Its digest, which the audit log holds, is what an older version's would be."""
    assert "skin_type" not in context_to_json(ClinicalContext())
    assert "device" not in context_to_json(ClinicalContext())
    assert "position" not in context_to_json(ClinicalContext())
    stated = context_to_json(ClinicalContext(skin_type=SkinType.II, device="d"))
    assert (stated["skin_type"], stated["device"]) == ("II", "d")


async def test_an_impression_is_a_review_before_the_answer(service) -> None:
    patient = await service.care()
    response = await service.upload(patient, **DESCRIBED)
    answer = response.json()
    (review,) = await reviews(service, answer)
    image = await row(service, answer)
    assert {
        name: review[name] for name in ("impression_diagnosis", "intended_referral", "before_answer")
    } == {
        "impression_diagnosis": "BCC",
        "intended_referral": "routine",
        "before_answer": True,
    }
    assert (review["clinician"], review["recorded_at"]) == ("dr", image["created_at"])
    assert review["request_id"] == response.headers["x-request-id"]
    assert (review["decision"], review["answers"]) == (None, [])
    upload = next(event for event in await service.events(response) if event["action"] == "upload")
    assert str(review["review_id"]) in upload["rows"]["reviews"]
    # It closes nothing.
    assert answer["open_demand"] is not None
    for empty in ("", "{}", '{"diagnosis": null}'):
        assert await reviews(service, await uploaded(service, impression=empty)) == []


async def test_repeated_under_its_key_an_impression_is_one(service) -> None:
    patient, headers = await service.care(), {"Idempotency-Key": uuid4().hex}
    answers = [await service.upload(patient, headers=headers, **DESCRIBED) for _ in range(2)]
    assert len(await reviews(service, answers[1].json())) == 1


async def test_only_a_clinicians_own_token_may_send_an_impression(service) -> None:
    """The PMS uploads for patients assigned to it, and has no impression; nothing is stored of what it sends with one."""
    patient = await service.care("pms")
    headers = service.token("pms", ("pms_service",))
    async with service.storing_nothing():
        response = await service.upload(patient, headers=headers, **DESCRIBED)
    body = service.hold_to_problem(response, 403, "forbidden")
    assert "impression" in body["detail"]
    await service.hold_to_event(response, "upload", "denied", reason="role")
    assert await service.owner.fetchval("SELECT count(*) FROM reviews WHERE clinician = 'pms'") == 0
    others = {name: value for name, value in DESCRIBED.items() if name != "impression"}
    assert (await service.upload(patient, headers=headers, **others)).status_code == 201
    both = service.token("pms", ("pms_service", "clinician"))
    assert (await service.upload(patient, headers=both, **DESCRIBED)).status_code == 201

"""GET /api/lesions/{lesion_id}/report: of real records, with the one audit event, and errors in the caller's words."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest

from serve_app.fhir.codes import MEDIA_TYPE
from tests.serve_app.erasure.erasing import erase, followed, uploaded
from tests.serve_app.fhir.validators import Validators


async def report(service, answer: dict[str, Any], **named: str) -> httpx.Response:
    return await service.get(f"/api/lesions/{answer['lesion_id']}/report", **named)


def of_kind(bundle: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [each["resource"] for each in bundle["entry"] if each["resource"]["resourceType"] == kind]


async def test_a_lesion_as_a_bundle_of_its_own_answer(service, validators: Validators) -> None:
    answer = await uploaded(service, encounter_id="e-7", anatom_site_general="upper extremity")
    response = await report(service, answer)
    assert response.status_code == 200
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["cache-control"] == "no-store"
    await service.hold_to_event(
        response, "read_report", "success", about=answer, names=("patient_id", "lesion_id")
    )
    bundle = response.json()
    assert validators.findings([bundle]) == []
    (observation,) = of_kind(bundle, "Observation")
    assert observation["identifier"][0]["value"] == answer["assessment_id"]
    shown = {
        each["code"]["coding"][0]["code"]: each["valueQuantity"]["value"] for each in observation["component"]
    }
    assert shown == answer["classification"]["probabilities"]
    assert observation["bodySite"]["text"] == "upper extremity"
    assert observation["encounter"]["identifier"]["value"] == "e-7"
    (device,) = of_kind(bundle, "Device")
    assert answer["provenance"]["model_digest"] in {each["value"] for each in device["version"]}
    # As the database has it, and to the byte.
    again = await report(service, answer)
    assert again.content == response.content
    (media,) = of_kind(bundle, "Media")
    original = await service.get(media["content"]["url"])
    assert original.content == service.image


async def test_once_erased_it_is_in_error_and_says_nothing_of_the_image(
    service, validators: Validators
) -> None:
    answer = await uploaded(service, anatom_site_general="upper extremity")
    later = await followed(service, answer)
    assert (await erase(service, answer)).status_code == 200
    bundle = (await report(service, answer)).json()
    first, second = (
        next(
            each
            for each in of_kind(bundle, "Observation")
            if each["identifier"][0]["value"] == one["assessment_id"]
        )
        for one in (answer, later)
    )
    assert (first["status"], second["status"]) == ("entered-in-error", "preliminary")
    assert "component" not in first
    assert "bodySite" not in first
    assert of_kind(bundle, "DiagnosticReport")[0]["status"] == "preliminary"
    assert (await erase(service, later)).status_code == 200
    gone = (await report(service, answer)).json()
    assert validators.findings([bundle, gone]) == []
    assert of_kind(gone, "DiagnosticReport")[0]["status"] == "entered-in-error"
    assert not of_kind(gone, "Device")
    assert not [each for each in of_kind(gone, "Media") if "url" in each["content"]]


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("application/fhir+json", MEDIA_TYPE),
        ("application/fhir+json;fhirVersion=4.0, application/fhir+json", MEDIA_TYPE),
        ("application/fhir+json, application/json", "application/problem+json"),
        ("*/*", "application/problem+json"),
        ("", "application/problem+json"),
    ],
)
async def test_an_error_is_in_fhirs_words_for_who_takes_no_others(
    service, validators: Validators, accept: str, media_type: str
) -> None:
    response = await report(service, {"lesion_id": uuid4()}, Accept=accept)
    assert response.status_code == 403
    assert response.headers["content-type"] == media_type
    await service.hold_to_event(response, "read_report", "denied")
    body = response.json()
    if media_type == MEDIA_TYPE:
        assert validators.findings([body]) == []
        (issue,) = body["issue"]
        assert (issue["code"], issue["details"]["coding"][0]["code"]) == ("forbidden", "forbidden")
    else:
        service.hold_to_problem(response, 403, "forbidden")


async def test_who_may_read_it_for_any_patient_is_nobody(service) -> None:
    answer = await uploaded(service)
    for role in ("supervisor", "pms_service", "auditor", "operator"):
        headers = service.token(f"x-{uuid4().hex[:6]}", (role,))
        response = await service.client.get(f"/api/lesions/{answer['lesion_id']}/report", headers=headers)
        service.hold_to_problem(response, 403, "forbidden")

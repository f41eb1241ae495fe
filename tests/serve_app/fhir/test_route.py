"""GET /api/lesions/{lesion_id}/report: of real records, with the one audit event, and errors in the caller's words."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import httpx
import pytest

from serve_app.audit.events import AuditEvent
from serve_app.domain.assessment import Outcome
from serve_app.domain.patient import ClinicalContext
from serve_app.domain.review import Decision
from serve_app.fhir.codes import MEDIA_TYPE
from serve_app.fhir.report import lesion_report
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import ErasureRequest
from serve_app.records.lesion_rows import Admission, ImageRecord
from serve_app.records.reviews import Statement
from tests.serve_app.erasure.erasing import erase, followed, uploaded
from tests.serve_app.fhir.histories import History
from tests.serve_app.fhir.validators import Validators
from tests.serve_app.records.conftest import admission

__all__ = ["admission"]


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


async def say(service, answer: dict[str, Any], name: str, **body: object) -> None:
    url = f"/api/lesions/{answer['lesion_id']}/{name}"
    response = await service.client.post(url, json=body, headers=service.token("dr"))
    assert response.status_code == 201, response.text


async def test_what_clinicians_say_is_in_it_and_their_note_is_not(service, validators: Validators) -> None:
    answer = await uploaded(service)
    about = {"assessment_id": answer["assessment_id"]}
    bundles = [(await report(service, answer)).json()]
    await say(service, answer, "reviews", **about, impression={"diagnosis": "NV"})
    bundles.append((await report(service, answer)).json())
    await say(service, answer, "reviews", **about, decision="accept", referral_made=True)
    bundles.append((await report(service, answer)).json())
    override = {"decision": "override", "reason": "clinical_examination", "urgency": "routine"}
    await say(service, answer, "reviews", **about, **override, note="Mrs Example's mole")
    bundles.append((await report(service, answer)).json())
    found = {"kind": "follow_up", "malignant": False, "observed_on": answer["created_at"][:10]}
    await say(service, answer, "outcomes", **found, source="clinician", code="x", code_system="urn:oid:1.2.3")
    bundles.append((await report(service, answer)).json())
    assert validators.findings(bundles) == []
    statuses = [of_kind(bundle, "DiagnosticReport")[0]["status"] for bundle in bundles]
    assert statuses == ["preliminary", "preliminary", "final", "amended", "amended"]
    proposals = [len(of_kind(bundle, "ServiceRequest")) for bundle in bundles]
    low = (answer["risk"]["level"], answer["risk"]["urgency"]) == ("low", "routine")
    assert proposals == ([0] * 5 if low else [1, 1, 0, 0, 0])
    decisions = [
        each
        for each in of_kind(bundles[-1], "RiskAssessment")
        if each["code"]["coding"][0]["code"] == "decision"
    ]
    assert [each["mitigation"] for each in decisions] == [
        f"Urgency: {answer['risk']['urgency']}",
        "Urgency: routine",
    ]
    assert "Mrs Example" not in json.dumps(bundles)


async def test_whatever_the_stores_hold_is_a_valid_report(service, validators: Validators, admission) -> None:
    """Histories from a seed, written by the stores that the routes use and read back; in pairs, which are linked, and apart again."""
    parts = service.app.state.services
    bundles, begun, pair = [], [], uuid4().hex[:8]
    for seed in range(40):
        history = History(seed)
        drawn, lesion_id = history.anything(), uuid4()
        patient = f"p-{pair}-{seed // 2}"
        for number, image in enumerate(reversed(drawn.images)):
            case = admission(
                lesion_id=lesion_id,
                patient_id=patient,
                new_lesion=number == 0,
                created_at=image.created_at,
                encounter_id=image.encounter_id,
                context=ClinicalContext(image.anatom_site_general),
            )
            await parts.records.admit(case)
            await _finish(parts, history, case, image)
        for outcome in drawn.outcomes:
            said = {
                "kind": outcome.kind,
                "diagnosis": outcome.diagnosis,
                "malignant": outcome.malignant,
                "observed_on": outcome.observed_on.isoformat(),
                "source": outcome.source,
            }
            statement = Statement(lesion_id=lesion_id, said=said, event=_event("record_outcome"))
            await parts.reviews.record_outcome(statement)
        timeline = await parts.records.timeline(lesion_id)
        assert {image.outcome for image in timeline.images} == {image.outcome for image in drawn.images}
        assert len(timeline.outcomes) == len(drawn.outcomes)
        bundles.append(lesion_report(timeline))
        begun.append((timeline.created_at, lesion_id))
        if seed % 2:
            (_, earlier), (_, later) = sorted(begun[-2:])
            for say, said in (("link", {"earlier_lesion_id": str(earlier)}), ("unlink", {})):
                statement = Statement(lesion_id=later, said={"reason": "other", **said}, event=_event(say))
                await getattr(parts.reviews, say)(statement)
                bundles += [lesion_report(await parts.records.timeline(each)) for each in (earlier, later)]
    assert len(bundles) == 40 + 20 * 4
    assert validators.findings(bundles) == []
    statuses = {of_kind(bundle, "DiagnosticReport")[0]["status"] for bundle in bundles}
    assert statuses == {"preliminary", "final", "amended", "entered-in-error"}


def _event(action: str) -> AuditEvent:
    return AuditEvent(action=action, actor="dr", outcome="success", request_id=str(uuid4()))


async def _finish(parts, history: History, case: Admission, image: ImageRecord) -> None:
    """Bring an image to where it was drawn to be, with its reviews; an erased one had an answer before."""
    done, ids = _event("classify"), case.assessment_id
    gone = image.outcome is Outcome.ERASED
    answer = history.assessment(Outcome.REVIEW) if gone else image.assessment
    if image.outcome is Outcome.FAILED:
        await parts.records.fail(ids, "undecodable_image", event=done)
    elif answer is not None:
        await parts.records.complete(ids, answer, embedding_space="a", event=done)
        for review in image.reviews:
            said = {"assessment_id": str(ids), "decision": review.decision, "reason": review.reason}
            if review.decision is Decision.OVERRIDE:
                said |= {"level": review.level, "diagnosis": review.diagnosis, "note": review.note}
            if review.decision is None:
                said |= {"impression_diagnosis": "NV"}
            await parts.reviews.review(Statement(lesion_id=case.lesion_id, said=said, event=_event("review")))
    if image.outcome in {Outcome.ERASED, Outcome.CANCELLED}:
        request = ErasureRequest(
            lesion_id=case.lesion_id,
            image_id=case.image_id,
            reason=ErasureReason.PATIENT_REQUEST,
            actor="chief",
            request_id="erased",
        )
        await parts.eraser.erasures.accept(request)


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

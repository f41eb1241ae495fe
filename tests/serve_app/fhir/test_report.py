"""Reports as FHIR: valid by three validators, and honest about what is missing and whose word each thing is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import date, timedelta
import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.domain.assessment import OpenDemand, Outcome, RiskLevel, Urgency
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import describe_problem
from serve_app.domain.review import Decision, OutcomeKind
from serve_app.fhir.codes import SNOMED, operation_outcome
from serve_app.fhir.report import contradicts, lesion_report, report_status
from serve_app.records.lesion_rows import LesionTimeline
from tests.serve_app.fhir.histories import History, within
from tests.serve_app.fhir.validators import Validators

Resource = dict[str, Any]
HIGH = {"likeliest": Diagnosis.MEL, "level": RiskLevel.HIGH, "urgency": Urgency.URGENT}


def resources(bundle: Resource, kind: str) -> list[Resource]:
    return [each["resource"] for each in bundle["entry"] if each["resource"]["resourceType"] == kind]


def observation(bundle: Resource, code: str = "assessment") -> Resource:
    """The first of a kind of our own."""
    return next(
        each
        for each in resources(bundle, "Observation")
        if any(coding["code"] == code for coding in each["code"]["coding"])
    )


def facts(bundle: Resource) -> dict[str, tuple[str, str]]:
    """Level and urgency by which of the three facts they are."""
    return {
        each["code"]["coding"][0]["code"]: (
            each["prediction"][0]["qualitativeRisk"]["text"],
            each["mitigation"],
        )
        for each in resources(bundle, "RiskAssessment")
    }


def refused(history: History) -> LesionTimeline:
    image = history.image(0, history.assessment(Outcome.REFUSED, refers=True))
    return history.timeline(image, demanding=image)


def failed(history: History) -> LesionTimeline:
    return history.timeline(history.failed())


def erased(history: History) -> LesionTimeline:
    image = history.image(0, history.assessment(**HIGH))
    image = replace(image, reviews=(history.review(image),))
    return history.timeline(history.erased(image))


def overridden(history: History) -> LesionTimeline:
    """And then found by histology to be what the service had said: the override stands, and both are told."""
    image = history.image(0, history.assessment(Outcome.REVIEW, **HIGH))
    said = {
        "level": RiskLevel.LOW,
        "urgency": Urgency.ROUTINE,
        "diagnosis": Diagnosis.NV,
        "referral_made": False,
        "follow_up_by": date(2026, 6, 1),
        "note": "As in 2019.",
    }
    image = replace(image, reviews=(history.review(image, Decision.OVERRIDE, **said),))
    return history.timeline(image, outcomes=(history.outcome(),))


@pytest.mark.parametrize("case", [refused, failed, erased, overridden])
def test_the_whole_of_a_hard_case(validators: Validators, case: Callable[[History], LesionTimeline]) -> None:
    """Golden files: whoever changes what is emitted sees it, all of it."""
    made = lesion_report(case(History(seed=16)))
    golden = Path(__file__).with_name(f"{case.__name__}.json")
    assert made == json.loads(golden.read_text(encoding="utf-8"))
    assert validators.findings([made]) == []


def test_every_bundle_passes_all_three_validators(validators: Validators) -> None:
    """200 lesions of everything that may be on record, of 1 to 4 images."""
    timelines = [History(seed).anything() for seed in range(200)]
    bundles = [lesion_report(timeline) for timeline in timelines]
    assert validators.findings(bundles) == []
    outcomes = Counter(image.outcome for timeline in timelines for image in timeline.images)
    assert set(outcomes) == set(Outcome)
    assert outcomes.total() >= 400
    statuses = Counter(resources(bundle, "DiagnosticReport")[0]["status"] for bundle in bundles)
    assert set(statuses) == {"preliminary", "final", "amended", "entered-in-error"}
    decided = [review for timeline in timelines for image in timeline.images for review in image.reviews]
    assert {(review.decision, review.diagnosis is None) for review in decided} >= {
        (each, known) for each in Decision for known in (True, False)
    }
    assert {each.kind for timeline in timelines for each in timeline.outcomes} == set(OutcomeKind)


def test_every_reference_is_in_the_bundle_or_an_identifier_and_nobody_is_named() -> None:
    for seed in range(50):
        bundle = lesion_report(History(seed).anything())
        urls = {entry["fullUrl"] for entry in bundle["entry"]}
        assert len(urls) == len(bundle["entry"])
        for entry in bundle["entry"]:
            assert entry["fullUrl"] == f"urn:uuid:{entry['resource']['id']}"
        for part in within(bundle):
            assert part.get("reference", next(iter(urls))) in urls
            if part.get("type") in ("Patient", "Encounter", "Practitioner"):
                assert set(part) == {"type", "identifier"}
        text = json.dumps(bundle)
        assert "Mrs Example" not in text  # a clinician's note
        assert '"hash"' not in text


def test_the_same_record_is_the_same_bundle_to_the_byte() -> None:
    first, again = (json.dumps(lesion_report(History(3).anything())) for _ in range(2))
    assert first == again
    history = History(3)
    image = history.image(0, history.assessment())
    later = replace(image, reviews=(history.review(image),))
    timeline = history.timeline(image)
    before, after = (lesion_report(replace(timeline, images=(each,))) for each in (image, later))
    assert before["timestamp"] < after["timestamp"]
    known = {entry["fullUrl"] for entry in before["entry"]}
    assert known < {entry["fullUrl"] for entry in after["entry"]}  # a PMS files nothing twice


@pytest.mark.parametrize(
    ("harm", "found_by"),
    [
        (lambda each: each.pop("code"), {"models", "schema", "invariants"}),
        (lambda each: each.pop("status"), {"models", "invariants"}),
        (lambda each: each.update(status="bogus"), {"schema"}),
        (lambda each: each.update(unheard="of"), {"models", "schema", "invariants"}),
        (lambda each: each.update(valueString="a", valueInteger=1), {"models"}),
        (lambda each: each.update(valueString="a", dataAbsentReason={"text": "b"}), {"invariants"}),
        (lambda each: each.update(effectiveDateTime="1 March"), {"models", "schema", "invariants"}),
    ],
)
def test_what_is_wrong_is_found(
    validators: Validators, harm: Callable[[Resource], None], found_by: set[str]
) -> None:
    """By at least those that are known to: none of the three alone finds all."""
    history = History()
    bundle = deepcopy(lesion_report(history.timeline(history.image(0, history.assessment()))))
    harm(observation(bundle))
    found = {
        "models": list(validators.by_models(bundle)),
        "schema": list(validators.by_schema(bundle)),
        "invariants": validators.by_invariants(bundle),
    }
    assert {name for name, texts in found.items() if texts} >= found_by


@pytest.mark.parametrize(
    ("outcome", "status", "absent"),
    [
        (Outcome.REFUSED, "preliminary", "not-performed"),
        (Outcome.PENDING, "registered", "temp-unknown"),
        (Outcome.FAILED, "cancelled", "error"),
        (Outcome.ERASED, "entered-in-error", "unknown"),
        (Outcome.CANCELLED, "entered-in-error", "not-performed"),
    ],
)
def test_what_has_no_answer_has_a_reason_and_never_a_value(
    outcome: Outcome, status: str, absent: str
) -> None:
    history = History()
    image = {
        Outcome.REFUSED: lambda: history.image(0, history.assessment(Outcome.REFUSED)),
        Outcome.PENDING: history.image,
        Outcome.FAILED: history.failed,
        Outcome.ERASED: lambda: history.erased(history.image(0, history.assessment(**HIGH))),
        Outcome.CANCELLED: lambda: history.erased(history.image()),
    }[outcome]()
    assert image.outcome is outcome
    bundle = lesion_report(history.timeline(image))
    made = observation(bundle)
    assert made["status"] == status
    assert made["dataAbsentReason"]["coding"][0]["code"] == absent
    assert made["dataAbsentReason"]["text"]
    assert not [name for name in made if name.startswith("value") or name == "component"]
    assert not resources(bundle, "RiskAssessment")
    assert not resources(bundle, "ServiceRequest")
    (media,) = resources(bundle, "Media")
    gone = status == "entered-in-error"
    assert ("url" in media["content"]) is not gone
    assert (media["status"] == "entered-in-error") is gone


def test_an_answer_has_a_component_a_class_and_marks_its_prediction_set() -> None:
    history = History()
    assessment = history.assessment(Outcome.REVIEW, **HIGH)
    made = observation(lesion_report(history.timeline(history.image(0, assessment))))
    found = assessment.classification
    shown = {each["code"]["coding"][0]["code"]: each for each in made["component"]}
    assert set(shown) == set(Diagnosis)
    assert sum(each["valueQuantity"]["value"] for each in shown.values()) == pytest.approx(1)
    assert {each["valueQuantity"]["unit"] for each in shown.values()} == {"1"}
    assert {name for name, each in shown.items() if "interpretation" in each} == set(found.prediction_set)
    said = [each["code"] for part in made["interpretation"] for each in part["coding"]]
    assert said == ["review", "IND", "low_margin"]
    assert "dataAbsentReason" not in made


def test_the_three_facts_are_told_apart_and_a_decision_changes_no_demand() -> None:
    """docs/clinical.md, demand and open demand."""
    history = History()
    image = history.image(0, history.assessment(**HIGH))
    demand = ("high", "Urgency: urgent")
    bundle = lesion_report(history.timeline(image, demanding=image))
    assert facts(bundle) == {"demand": demand, "open-demand": demand}
    (proposal,) = resources(bundle, "ServiceRequest")
    assert (proposal["status"], proposal["intent"], proposal["priority"]) == ("draft", "proposal", "asap")
    lower = {"level": RiskLevel.LOW, "urgency": Urgency.ROUTINE}
    decided = replace(image, reviews=(history.review(image, Decision.OVERRIDE, **lower),))
    bundle = lesion_report(history.timeline(decided))
    assert facts(bundle) == {"demand": demand, "decision": ("low", "Urgency: routine")}
    assert not resources(bundle, "ServiceRequest")
    said = resources(bundle, "DiagnosticReport")[0]["conclusion"]
    assert "Demand of this image: high, urgent. Open demand of the lesion: none." in said
    assert "overridden (clinical_examination), low, routine." in said
    # Whose word it is: the model's, a clinician's.
    performers = [
        (each["code"]["coding"][0]["code"], "identifier" in each["performer"])
        for each in resources(bundle, "RiskAssessment")
    ]
    assert performers == [("demand", False), ("decision", True)]


def test_a_decision_on_the_diagnosis_alone_says_nothing_of_level_and_urgency() -> None:
    history = History()
    image = history.image(0, history.assessment(**HIGH))
    only = {"level": None, "urgency": None, "diagnosis": Diagnosis.NV}
    decided = replace(image, reviews=(history.review(image, Decision.OVERRIDE, **only),))
    bundle = lesion_report(history.timeline(decided))
    said = resources(bundle, "DiagnosticReport")[0]["conclusion"]
    assert said.endswith("overridden (clinical_examination), Melanocytic naevus.")
    decision = resources(bundle, "RiskAssessment")[-1]
    assert decision["code"]["coding"][0]["code"] == "decision"
    assert "mitigation" not in decision
    assert "qualitativeRisk" not in decision["prediction"][0]


@pytest.mark.parametrize("later", ["image", "refused", "failed", "pending", "erased"])
def test_an_open_demand_and_its_proposal_outlast_whatever_comes_later(later: str) -> None:
    history = History()
    first = history.image(0, history.assessment(**HIGH))
    timeline = history.timeline(first, demanding=first)
    if later == "erased":
        timeline = replace(timeline, images=(history.erased(first),))
    else:
        newest = {
            "image": lambda: history.image(9, history.assessment()),
            "refused": lambda: history.image(9, history.assessment(Outcome.REFUSED)),
            "failed": lambda: history.failed(9),
            "pending": lambda: history.image(9),
        }[later]()
        timeline = replace(timeline, images=(newest, first))
    bundle = lesion_report(timeline)
    assert facts(bundle)["open-demand"] == ("high", "Urgency: urgent")
    assert len(resources(bundle, "ServiceRequest")) == 1
    report = resources(bundle, "DiagnosticReport")[0]
    assert report["status"] == ("entered-in-error" if later == "erased" else "preliminary")
    assert "Open demand of the lesion since 2026-03-01T08:30:00.250Z: high, urgent." in report["conclusion"]
    # What an erased image demanded stays, and what a pending one will is not known: of neither is it "none".
    assert ("Demand of this image" in report["conclusion"]) == (later in {"image", "refused"})


def test_a_refused_image_shows_what_its_checklist_demands() -> None:
    bundle = lesion_report(refused(History()))
    assert facts(bundle)["demand"] == ("high", "Urgency: urgent")


def test_low_and_routine_propose_no_referral() -> None:
    history = History()
    image = history.image(0, history.assessment())
    bundle = lesion_report(history.timeline(image, demanding=image))
    assert facts(bundle)["open-demand"] == ("low", "Urgency: routine")
    assert not resources(bundle, "ServiceRequest")


def test_how_far_a_clinician_stands_behind_the_report() -> None:
    history = History()
    image = history.image(0, history.assessment())
    accepted = replace(image, reviews=(history.review(image),))
    lower = {"level": RiskLevel.LOW, "urgency": Urgency.ROUTINE}
    overriding = history.review(image, Decision.OVERRIDE, **lower)
    impression = replace(image, reviews=(history.review(image, None),))
    benign, melanoma = history.outcome(diagnosis=Diagnosis.NV, malignant=False), history.outcome()
    for images, outcomes, status in (
        ([image], (), "preliminary"),
        ([impression], (), "preliminary"),
        ([accepted], (), "final"),
        ([replace(image, reviews=(overriding,))], (), "amended"),
        ([accepted], (benign,), "final"),
        ([accepted], (melanoma,), "amended"),
        ([image], (melanoma,), "amended"),
        ([history.erased(accepted)], (melanoma,), "entered-in-error"),
        # Whatever no clinician has seen yet: the report is not final any more.
        ([history.image(9, history.assessment()), accepted], (), "preliminary"),
        ([history.image(9), accepted], (), "preliminary"),
        ([history.failed()], (), "preliminary"),
        # Of what failed, or is gone, there is no answer to decide on.
        ([history.failed(9), accepted], (), "final"),
        ([history.erased(history.image(9, history.assessment())), accepted], (), "final"),
    ):
        assert report_status(history.timeline(*images, outcomes=outcomes)) == status
    # A later word of a clinician counts.
    again = replace(history.review(image), recorded_at=overriding.recorded_at + timedelta(hours=1))
    assert report_status(history.timeline(replace(image, reviews=(again, overriding)))) == "final"
    # An older image's demand that is still open keeps it from being final.
    demand = OpenDemand(RiskLevel.HIGH, Urgency.URGENT, image.image_id, image.assessment_id, image.created_at)
    open_still = replace(history.timeline(accepted), open_demand=demand)
    assert report_status(open_still) == "preliminary"


def test_only_an_accepted_answer_is_final_and_who_said_so_is_its_verifier() -> None:
    history = History()
    image = history.image(0, history.assessment())
    for decision, status in ((Decision.ACCEPT, "final"), (Decision.OVERRIDE, "preliminary")):
        reviewed = replace(image, reviews=(history.review(image, decision),))
        bundle = lesion_report(history.timeline(reviewed))
        assert observation(bundle)["status"] == status
        roles = [each["agent"][0]["type"]["coding"][0]["code"] for each in resources(bundle, "Provenance")]
        assert roles == ["assembler", "verifier"]
        who = resources(bundle, "Provenance")[1]["agent"][0]["who"]
        assert who["identifier"] == {"system": "urn:derm-cds:subject", "value": "dr-7"}


def test_what_contradicts_an_answer() -> None:
    history = History()
    naevus, unknown, keratosis = (
        history.image(40, history.assessment(likeliest=each))
        for each in (Diagnosis.NV, Diagnosis.UNK, Diagnosis.AK)
    )
    melanoma = history.outcome(observed_on=date(2026, 5, 1))
    nothing_named = replace(melanoma, diagnosis=None)
    assert contradicts(melanoma, naevus)
    assert contradicts(nothing_named, naevus)
    assert not contradicts(replace(nothing_named, malignant=False), naevus)
    assert not contradicts(replace(melanoma, diagnosis=Diagnosis.NV, malignant=None), naevus)
    assert not contradicts(melanoma, unknown)
    assert contradicts(melanoma, keratosis)
    assert contradicts(
        replace(nothing_named, malignant=False), keratosis
    )  # it counts as malignant, as in the risk
    assert not contradicts(melanoma, history.failed())
    # It was taken after the specimen: of what is there since. Unless it is the one that was named.
    earlier = replace(melanoma, observed_on=date(2026, 3, 2))
    assert not contradicts(earlier, naevus)
    assert contradicts(replace(earlier, image_id=naevus.image_id), naevus)
    assert contradicts(replace(melanoma, observed_on=naevus.created_at.date() - timedelta(days=1)), naevus)


def test_histology_is_beside_the_answer_with_the_sources_own_code() -> None:
    bundle = lesion_report(overridden(History()))
    made = observation(bundle, "histology")
    assert made["category"][0]["coding"][0]["code"] == "laboratory"
    codes = [(each["system"], each["code"]) for each in made["valueCodeableConcept"]["coding"]]
    assert codes == [
        ("http://terminology.hl7.org/CodeSystem/icd-o-3", "8720/3"),
        ("urn:derm-cds:diagnosis", "MEL"),
        (SNOMED, "93655004"),
    ]
    assert (made["effectiveDateTime"], made["issued"]) == ("2026-04-01", "2026-04-09T07:00:00.000Z")


def test_model_and_policy_are_one_device_with_their_digests() -> None:
    history = History()
    images = [history.image(day, history.assessment()) for day in (9, 0)]
    (device,) = resources(lesion_report(history.timeline(*images)), "Device")
    versions = {each["type"]["coding"][0]["code"]: each["value"] for each in device["version"]}
    assert versions == {
        "model_digest": "ab" * 32,
        "embedding_space": "lite0.1.space",
        "preprocess_version": "3",
        "policy_version": "2026-11.4",
        "service_version": "0.1.0",
    }
    newer = history.image(20, history.assessment(model="b3.2"))
    assert len(resources(lesion_report(history.timeline(newer, *images)), "Device")) == 2


def test_an_error_in_fhirs_words_is_valid(validators: Validators) -> None:
    statuses = (401, 403, 404, 405, 409, 410, 413, 422, 429, 500, 503)
    problems = [describe_problem(status, "a_code", "What happened.", "r-1") for status in statuses]
    assert validators.findings(map(operation_outcome, problems)) == []

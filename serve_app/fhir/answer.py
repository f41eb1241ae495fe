"""The service's answer to one image as FHIR: Observation, Media, the demand as a RiskAssessment, Provenance, Device.

What was refused, failed, erased or is pending has a reason and never a value. The Observation is `final` only where a
clinician accepted the answer: one that was overridden was never verified, nor is it changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from serve_app.domain.assessment import Assessment, Outcome, Provenance, RiskLevel, Urgency, format_time
from serve_app.domain.review import Decision, Review
from serve_app.fhir.codes import (
    FACTS,
    OWN,
    PHOTOGRAPHY,
    TERMS,
    Fact,
    Resource,
    coding,
    concept,
    diagnosis_concept,
    hl7,
    identifier,
    level_concept,
    logical,
    resource,
    site_concept,
    to,
)
from serve_app.records.answers import lesion_url, reasons_of
from serve_app.records.lesion_rows import ImageRecord, LesionTimeline

GONE = frozenset({Outcome.ERASED, Outcome.CANCELLED})
#: FHIR's data-absent-reason of what has no answer, or none any more.
_ABSENT = {
    Outcome.REFUSED: "not-performed",
    Outcome.PENDING: "temp-unknown",
    Outcome.FAILED: "error",
    Outcome.CANCELLED: "not-performed",
    Outcome.ERASED: "unknown",
}
_STATUS = {Outcome.PENDING: "registered", Outcome.FAILED: "cancelled"} | dict.fromkeys(
    GONE, "entered-in-error"
)
#: Of the Device's `version`: everything that the answer depends on.
_VERSIONS = {
    "model_digest": "SHA-256 of the model",
    "embedding_space": "Embedding space",
    "preprocess_version": "Preprocessing",
    "policy_version": "Risk policy",
    "service_version": "Service",
}
NO_DIAGNOSIS = "Decision support for clinicians; not a diagnosis."


def decision_on(image: ImageRecord) -> Review | None:
    """The newest decision on an image's answer; an impression is none."""
    decided = [review for review in image.reviews if review.decision is not None]
    return max(decided, key=lambda review: (review.recorded_at, review.review_id), default=None)


def answer_resources(timeline: LesionTimeline, image: ImageRecord) -> Iterator[Resource]:
    """One image, what was found on it, what that demands, and what made it; Devices twice are the caller's to drop."""
    yield _observation(timeline, image)
    yield _media(timeline, image)
    answer = image.assessment
    if answer is None:
        return
    targets = [to("Observation", image.assessment_id)]
    if answer.demand is not None:
        said = answer.risk.factors if answer.risk else answer.reasons
        targets.append(to("RiskAssessment", Fact.DEMAND, image.assessment_id))
        yield risk_assessment(
            *(timeline, image, Fact.DEMAND, image.assessment_id, *answer.demand),
            status=_status(image),
            occurrenceDateTime=format_time(image.created_at),
            performer=device_of(image),
            why=[each.message for each in said],
        )
    yield resource(
        "Provenance",
        image.assessment_id,
        target=targets,
        recorded=format_time(image.completed_at or image.created_at),
        activity=concept(coding(f"{OWN}:action", "classify")),
        agent=[{"type": hl7("provenance-participant-type", "assembler"), "who": device_of(image)}],
        entity=[
            {"role": "source", "what": to("Media", image.image_id)},
            {
                "role": "source",
                "what": {"identifier": identifier("policy", answer.provenance.policy_version)},
            },
        ],
    )
    yield _device(answer.provenance)


def risk_assessment(
    timeline: LesionTimeline,
    image: ImageRecord | None,
    fact: Fact,
    of: object,
    level: RiskLevel | None,
    urgency: Urgency | None,
    *,
    why: list[str],
    **elements: Any,  # noqa: ANN401
) -> Resource:
    """One level and urgency, and which of the three facts they are; `image` is the one that they rest on."""
    prediction: dict[str, Any] = {"outcome": concept(text="Malignant or pre-malignant lesion of the skin")}
    if level is not None:
        prediction["qualitativeRisk"] = level_concept(level)
    if why:
        prediction["rationale"] = " ".join(why)
    return resource(
        "RiskAssessment",
        *(fact, of),
        code=concept(coding(f"{OWN}:fact", fact.value), text=FACTS[fact]),
        subject=patient_of(timeline),
        encounter=encounter_of(image),
        basis=[to("Observation", image.assessment_id)] if image else None,
        prediction=[prediction],
        mitigation=f"Urgency: {urgency.value}" if urgency is not None else None,
        **elements,
    )


def patient_of(timeline: LesionTimeline) -> dict[str, Any]:
    """Refer to the patient by the PMS's own id."""
    return logical("Patient", "patient", timeline.patient_id)


def encounter_of(image: ImageRecord | None) -> dict[str, Any] | None:
    """Refer to the encounter that the image was sent for, by the PMS's own id; None where none was named."""
    named = image.encounter_id if image else None
    return logical("Encounter", "encounter", named) if named else None


def device_of(image: ImageRecord | None) -> dict[str, str] | None:
    """Refer to what made an image's answer; None without one."""
    answer = image.assessment if image else None
    return to("Device", *asdict(answer.provenance).values()) if answer else None


def site_of(image: ImageRecord) -> dict[str, Any] | None:
    """Where on the body, as it was sent with the image."""
    return site_concept(image.anatom_site_general) if image.anatom_site_general else None


def _status(image: ImageRecord) -> str:
    decided = decision_on(image)
    accepted = decided is not None and decided.decision is Decision.ACCEPT
    return _STATUS.get(image.outcome, "final" if accepted else "preliminary")


def _observation(timeline: LesionTimeline, image: ImageRecord) -> Resource:
    """The answer: a component a diagnosis; or why there is none."""
    reasons, missing = reasons_of(image), None
    said = [f"{reason.message} {reason.action}" for reason in reasons]
    if erasure := image.erasure:
        when = format_time(erasure.erased_at)
        said.append(f"Erased {when} ({erasure.reason}), receipt {erasure.receipt_id}.")
    if absent := _ABSENT.get(image.outcome):
        why = " ".join(reason.message for reason in reasons)
        missing = concept(coding(f"{TERMS}/data-absent-reason", absent), text=why)
    outcome = [coding(f"{OWN}:outcome", image.outcome.value)]
    if image.outcome is Outcome.REVIEW:
        outcome.append(coding(f"{TERMS}/v3-ObservationInterpretation", "IND"))
    return resource(
        "Observation",
        image.assessment_id,
        identifier=[identifier("assessment", image.assessment_id)],
        status=_status(image),
        category=[hl7("observation-category", "imaging")],
        code=concept(
            coding(f"{OWN}:observation", "assessment"),
            text="Probabilities of nine diagnoses, made by software",
        ),
        subject=patient_of(timeline),
        focus=[to("BodyStructure", timeline.lesion_id)],
        encounter=encounter_of(image),
        effectiveDateTime=format_time(image.created_at),
        issued=format_time(image.completed_at) if image.completed_at else None,
        dataAbsentReason=missing,
        interpretation=[
            concept(*outcome, text=image.outcome.value),
            *(concept(coding(f"{OWN}:reason", each.code), text=each.message) for each in reasons),
        ],
        note=[{"text": text} for text in (NO_DIAGNOSIS, *said)],
        bodySite=site_of(image),
        device=device_of(image),
        derivedFrom=[to("Media", image.image_id)],
        component=_components(image.assessment),
    )


def _components(answer: Assessment | None) -> list[dict[str, Any]] | None:
    """A component a diagnosis; those of the prediction set are marked."""
    found = answer.classification if answer else None
    if found is None:
        return None
    within = concept(
        coding(f"{OWN}:prediction-set", "included"), text=f"In the prediction set (coverage {found.coverage})"
    )
    share = {"unit": "1", "system": "http://unitsofmeasure.org", "code": "1"}
    return [
        {"code": diagnosis_concept(diagnosis), "valueQuantity": {"value": probability} | share}
        | ({"interpretation": [within]} if diagnosis in found.prediction_set else {})
        for diagnosis, probability in found.probabilities.items()
    ]


def _media(timeline: LesionTimeline, image: ImageRecord) -> Resource:
    """Where the original is, for whoever may download it. No hash: none of the plain image is on record."""
    gone, content = image.outcome in GONE, {"contentType": image.content_type}
    if not gone:
        content["url"] = f"{lesion_url(image.lesion_id)}/images/{image.image_id}"
    return resource(
        "Media",
        image.image_id,
        identifier=[identifier("image", image.image_id)],
        status="entered-in-error" if gone else "completed",
        type=hl7("media-type", "image"),
        modality=concept(PHOTOGRAPHY.coding),
        subject=patient_of(timeline),
        encounter=encounter_of(image),
        createdDateTime=format_time(image.created_at),
        bodySite=site_of(image),
        height=image.height,
        width=image.width,
        content=content,
    )


def _device(made_by: Provenance) -> Resource:
    """The model, with the policy and whatever else the answer depends on, each in its version."""
    versions = asdict(made_by)
    return resource(
        "Device",
        *versions.values(),
        identifier=[identifier("model", made_by.model_id)],
        status="active",
        deviceName=[
            {"name": "pms-derm-cds", "type": "user-friendly-name"},
            {"name": made_by.model_id, "type": "model-name"},
        ],
        type=concept(text="Software: decision support on dermoscopic images"),
        version=[
            {"type": concept(coding(f"{OWN}:version", name), text=text), "value": versions[name]}
            for name, text in _VERSIONS.items()
        ],
    )

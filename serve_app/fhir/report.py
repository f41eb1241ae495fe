"""One lesion as a FHIR R4B Bundle, made of the record alone: the same record is the same Bundle, to the byte.

Three things are told apart in it (docs/clinical.md): the *demand* of each image, the *open demand* of the lesion and a
clinician's *decision*. Each is a RiskAssessment whose `code` says which of them it is. Nobody is named: patient,
encounter and clinician are logical references by the identifier that the PMS gave, and a clinician's note stays in the
timeline, since free text may name anybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
import re
from typing import Any

from serve_app.domain.assessment import Outcome, RiskLevel, Urgency, format_time
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.review import Decision, LesionOutcome, OutcomeKind, Review
from serve_app.fhir.answer import (
    GONE,
    NO_DIAGNOSIS,
    answer_resources,
    decision_on,
    device_of,
    encounter_of,
    patient_of,
    risk_assessment,
    site_of,
)
from serve_app.fhir.codes import (
    DERMATOSCOPY,
    OWN,
    PATHOLOGY,
    PRIORITIES,
    SKIN_LESION,
    Fact,
    Resource,
    clinician,
    coding,
    concept,
    diagnosis_concept,
    hl7,
    identifier,
    resource,
    to,
)
from serve_app.records.answers import reasons_of
from serve_app.records.lesion_rows import ImageRecord, LesionTimeline

#: A visit in the evening may be on the next day in UTC, which the time of an image is in.
_A_DAY = timedelta(days=1)
#: FHIR's data type `code`.
_CODE = re.compile(r"[^\s]+( [^\s]+)*")


def lesion_report(timeline: LesionTimeline) -> Resource:
    """Make the Bundle (collection) of a lesion, the DiagnosticReport first."""
    made = [_diagnostic_report(timeline), _body_structure(timeline)]
    for image in timeline.images:
        made += answer_resources(timeline, image)
    made += _open_demand(timeline)
    for image, review in _decisions(timeline):
        made += _decision(timeline, image, review)
    made += [_outcome(timeline, outcome) for outcome in timeline.outcomes]
    once = {each["id"]: each for each in made}
    return resource(
        "Bundle",
        timeline.lesion_id,
        identifier=identifier("lesion", timeline.lesion_id),
        type="collection",
        timestamp=_changed_at(timeline),
        entry=[{"fullUrl": f"urn:uuid:{name}", "resource": each} for name, each in once.items()],
    )


def report_status(timeline: LesionTimeline) -> str:
    """Say how far a clinician stands behind the report: the status of the DiagnosticReport.

    It is the newest image's that is not erased and did not fail: of that there is no answer to decide on. `preliminary`
    until a clinician has decided on it and no demand of the lesion is open; then `final`, or `amended` where the
    answer was overridden. `amended` as well once what the lesion turned out to be contradicts that image's answer.
    `entered-in-error` when every image is erased.
    """
    if all(image.outcome in GONE for image in timeline.images):
        return "entered-in-error"
    newest = _newest_answered(timeline)
    if newest is None:
        return "preliminary"
    if any(contradicts(outcome, newest) for outcome in timeline.outcomes):
        return "amended"
    decided = decision_on(newest)
    if decided is None or timeline.open_demand is not None:
        return "preliminary"
    return "final" if decided.decision is Decision.ACCEPT else "amended"


def _newest_answered(timeline: LesionTimeline) -> ImageRecord | None:
    """The newest image that has an answer, or will have one."""
    without = {*GONE, Outcome.FAILED}
    return next((image for image in timeline.images if image.outcome not in without), None)


def contradicts(outcome: LesionOutcome, image: ImageRecord) -> bool:
    """Whether a lesion turned out to be something else than an image's most probable diagnosis.

    Where only benign or malignant is known, that is compared. An image that is newer than the outcome is of what is
    there since, and an answer of UNK claims nothing.
    """
    found = image.assessment.classification if image.assessment else None
    if found is None:
        return False
    if outcome.image_id != image.image_id and image.created_at.date() > outcome.observed_on + _A_DAY:
        return False
    likeliest = found.top3[0].diagnosis
    if likeliest is Diagnosis.UNK:
        return False
    if outcome.diagnosis not in {None, Diagnosis.UNK}:
        return outcome.diagnosis is not likeliest
    return outcome.malignant is not None and outcome.malignant != (likeliest in MALIGNANT)


def _decisions(timeline: LesionTimeline) -> list[tuple[ImageRecord, Review]]:
    """Every decision with the image that it is on, newest last."""
    found = [(image, review) for image in timeline.images for review in image.reviews if review.decision]
    return sorted(found, key=lambda each: (each[1].recorded_at, each[1].review_id))


def _changed_at(timeline: LesionTimeline) -> str:
    """When the newest of what is on record was written."""
    moments = [timeline.created_at, *(outcome.recorded_at for outcome in timeline.outcomes)]
    moments += [moment for link in timeline.links for moment in (link.linked_at, link.ended_at) if moment]
    for image in timeline.images:
        moments += [image.created_at, *(review.recorded_at for review in image.reviews)]
        moments += [image.completed_at] if image.completed_at else []
        moments += [image.erasure.erased_at] if image.erasure else []
    return format_time(max(moments))


def _diagnostic_report(timeline: LesionTimeline) -> Resource:
    decided = [review for _, review in _decisions(timeline)]
    clinicians = [clinician(subject) for subject in dict.fromkeys(review.clinician for review in decided)]
    results = [to("Observation", image.assessment_id) for image in timeline.images]
    results += [to("Observation", "decision", review.review_id) for review in decided if review.diagnosis]
    results += [to("Observation", "outcome", outcome.outcome_id) for outcome in timeline.outcomes]
    return resource(
        "DiagnosticReport",
        timeline.lesion_id,
        identifier=[identifier("lesion", timeline.lesion_id)],
        status=report_status(timeline),
        category=[hl7("v2-0074", "IMG")],
        code=concept(DERMATOSCOPY.coding, text="Dermoscopy of one skin lesion, with decision support"),
        subject=patient_of(timeline),
        encounter=encounter_of(timeline.latest),
        effectiveDateTime=format_time(timeline.latest.created_at),
        issued=_changed_at(timeline),
        performer=clinicians,
        resultsInterpreter=clinicians,
        result=results,
        media=[{"link": to("Media", image.image_id)} for image in timeline.images],
        conclusion=" ".join(_conclusion(timeline)),
    )


def _conclusion(timeline: LesionTimeline) -> Iterator[str]:
    """In words, for whoever sees no more of the Bundle than this: which of the facts each is, and what is missing."""
    newest, demand, decisions = timeline.latest, timeline.open_demand, _decisions(timeline)
    yield f"{NO_DIAGNOSIS} Newest image, {format_time(newest.created_at)}: {newest.outcome.value}."
    yield from (f"{reason.message} {reason.action}" for reason in reasons_of(newest))
    if newest.assessment is not None:  # without an answer, what it demands is not known, or not told any more
        yield f"Demand of this image: {_words(*(newest.assessment.demand or (None, None)))}."
    if demand is None:
        yield "Open demand of the lesion: none."
    else:
        words = _words(demand.level, demand.urgency)
        yield f"Open demand of the lesion since {format_time(demand.since)}: {words}."
    if not decisions:
        yield "Decision of a clinician: none yet."
    else:
        _, decided = decisions[-1]
        verb = f"overridden ({decided.reason})" if decided.reason else "accepted"
        diagnosis = decided.diagnosis.display_name if decided.diagnosis else None
        parts = [each for each in (verb, diagnosis, decided.level, decided.urgency) if each is not None]
        yield f"Decision of a clinician, {format_time(decided.recorded_at)}: {', '.join(parts)}."
    answered = _newest_answered(timeline)
    for outcome in timeline.outcomes:
        against = " It contradicts the answer." if answered and contradicts(outcome, answered) else ""
        yield f"{_outcome_words(outcome)}.{against}"


def _words(level: RiskLevel | None, urgency: Urgency | None) -> str:
    return ", ".join(each.value for each in (level, urgency) if each is not None) or "none"


def _body_structure(timeline: LesionTimeline) -> Resource:
    """The lesion itself, by which its images are one story, with the ids of those that are linked with it; where it is as last sent."""
    sites = (site_of(image) for image in timeline.images)
    return resource(
        "BodyStructure",
        timeline.lesion_id,
        identifier=[identifier("lesion", lesion_id) for lesion_id in timeline.lesion_ids],
        morphology=concept(SKIN_LESION.coding),
        location=next((site for site in sites if site), None),
        patient=patient_of(timeline),
    )


def _open_demand(timeline: LesionTimeline) -> Iterator[Resource]:
    """What no clinician has answered yet, and the referral that it advises: a proposal, which nobody ordered."""
    demand = timeline.open_demand
    if demand is None:
        return
    image = next((each for each in timeline.images if each.assessment_id == demand.assessment_id), None)
    yield risk_assessment(
        *(timeline, image, Fact.OPEN_DEMAND, timeline.lesion_id, demand.level, demand.urgency),
        status="preliminary",
        occurrenceDateTime=format_time(demand.since),
        performer=device_of(image),
        why=[],
    )
    if (demand.level, demand.urgency) == (RiskLevel.LOW, Urgency.ROUTINE):
        return
    yield resource(
        "ServiceRequest",
        timeline.lesion_id,
        status="draft",
        intent="proposal",
        priority=PRIORITIES[demand.urgency],
        code=concept(text=f"Referral to dermatology, {demand.urgency.value}"),
        subject=patient_of(timeline),
        encounter=encounter_of(image),
        authoredOn=format_time(demand.since),
        requester=device_of(image),
        reasonReference=[to("Observation", image.assessment_id)] if image else None,
        note=[{"text": "Advised by software for the open demand of the lesion; not an order."}],
    )


def _decision(timeline: LesionTimeline, image: ImageRecord, review: Review) -> Iterator[Resource]:
    """What a clinician decided, and that it was they."""
    said_by, moment = clinician(review.clinician), format_time(review.recorded_at)
    why = [f"Overridden: {review.reason}." if review.reason else "Accepted."]
    if review.referral_made is not None:
        why.append(f"Referral made: {'yes' if review.referral_made else 'no'}.")
    if review.follow_up_by is not None:
        why.append(f"To be seen again by {review.follow_up_by.isoformat()}.")
    targets = [
        to("DiagnosticReport", timeline.lesion_id),
        to("Observation", image.assessment_id),
        to("RiskAssessment", Fact.DECISION, review.review_id),
    ]
    yield risk_assessment(
        *(timeline, image, Fact.DECISION, review.review_id, review.level, review.urgency),
        identifier=[identifier("review", review.review_id)],
        status="final",
        occurrenceDateTime=moment,
        performer=said_by,
        why=why,
    )
    if review.diagnosis is not None:
        targets.append(to("Observation", "decision", review.review_id))
        yield resource(
            "Observation",
            *("decision", review.review_id),
            status="final",
            category=[hl7("observation-category", "exam")],
            code=concept(
                coding(f"{OWN}:observation", "decision"), text="Diagnosis of the clinician who decided"
            ),
            subject=patient_of(timeline),
            focus=[to("BodyStructure", timeline.lesion_id)],
            encounter=encounter_of(image),
            effectiveDateTime=moment,
            performer=[said_by],
            valueCodeableConcept=diagnosis_concept(review.diagnosis),
        )
    yield resource(
        "Provenance",
        *("review", review.review_id),
        target=targets,
        recorded=moment,
        reason=[concept(coding(f"{OWN}:override-reason", review.reason.value))] if review.reason else None,
        activity=concept(coding(f"{OWN}:decision", str(review.decision))),
        agent=[{"type": hl7("provenance-participant-type", "verifier"), "who": said_by}],
    )


def _outcome(timeline: LesionTimeline, outcome: LesionOutcome) -> Resource:
    """What the lesion turned out to be: beside the answer, never in its place."""
    histology = outcome.kind is OutcomeKind.HISTOLOGY
    pictured = [image.image_id for image in timeline.images if image.image_id == outcome.image_id]
    return resource(
        "Observation",
        *("outcome", outcome.outcome_id),
        identifier=[identifier("outcome", outcome.outcome_id)],
        status="final",
        category=[hl7("observation-category", "laboratory" if histology else "exam")],
        code=concept(
            coding(f"{OWN}:outcome-kind", outcome.kind.value),
            *([PATHOLOGY.coding] if histology else []),
            text="Histology" if histology else "Follow-up",
        ),
        subject=patient_of(timeline),
        focus=[to("BodyStructure", timeline.lesion_id)],
        effectiveDateTime=outcome.observed_on.isoformat(),
        issued=format_time(outcome.recorded_at),
        performer=[clinician(outcome.recorded_by)],
        valueCodeableConcept=_turned_out(outcome),
        method=concept(coding(f"{OWN}:outcome-source", outcome.source.value), text=outcome.source.value),
        derivedFrom=[to("Media", image_id) for image_id in pictured],
    )


def _turned_out(outcome: LesionOutcome) -> dict[str, Any]:
    """The source's own code as it was sent, and our class; benign or malignant where none of them fits."""
    codings = []
    if outcome.code and outcome.code_system and _CODE.fullmatch(outcome.code):
        codings.append(coding("".join(outcome.code_system.split()), outcome.code))
    if outcome.diagnosis is not None:
        codings += diagnosis_concept(outcome.diagnosis)["coding"]
    else:
        codings.append(coding(f"{OWN}:malignancy", _malignancy(outcome)))
    return concept(*codings, text=_outcome_words(outcome))


def _outcome_words(outcome: LesionOutcome) -> str:
    found = _malignancy(outcome) if outcome.diagnosis is None else outcome.diagnosis.display_name
    kind = "Histology" if outcome.kind is OutcomeKind.HISTOLOGY else "Follow-up"
    return f"{kind} of {outcome.observed_on.isoformat()}: {found}"


def _malignancy(outcome: LesionOutcome) -> str:
    """What is known where no diagnosis fits."""
    return "malignant" if outcome.malignant else "benign"

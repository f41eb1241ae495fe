"""Domain values as the JSON of the contract.

Answers are built as plain dictionaries, not validated models: they come from typed domain
values, and the tests hold them against the schema that the OpenAPI document publishes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from uuid import UUID

from serve_app.domain.assessment import Assessment, Classification, Neighbours, Outcome, SimilarCase
from serve_app.domain.diagnosis import Diagnosis
from serve_app.records.lesion_rows import Confirmation, ImageRecord, LesionSummary, LesionTimeline, OpenDemand

_ARCHIVE_PAGE = "https://api.isic-archive.com/images/{isic_id}/"


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def archive_url(isic_id: str) -> str:
    """The archive's own page of an image, for a reader who may follow it; nothing here does."""
    return _ARCHIVE_PAGE.format(isic_id=isic_id)


def reference_url(isic_id: str) -> str:
    """Where a reference image's picture is."""
    return f"/api/references/{isic_id}/image"


def lesion_url(lesion_id: UUID) -> str:
    """Where a lesion's timeline is."""
    return f"/api/lesions/{lesion_id}"


def assessment_answer(
    record: ImageRecord,
    *,
    lesion_id: UUID,
    patient_id: str,
    pictured: Collection[str],
    pms_url: str | None = None,
) -> dict[str, Any]:
    """One image's answer; without one, the outcome says why, and every finding is null.

    `pictured`: which of `references_of` the record have a picture here.
    `pms_url`: the PMS's address, where one is configured, for the link to the encounter.
    """
    answer: dict[str, Any] = {
        "assessment_id": str(record.assessment_id),
        "lesion_id": str(lesion_id),
        "image_id": str(record.image_id),
        "patient_id": patient_id,
        "encounter_id": record.encounter_id,
        "created_at": format_time(record.created_at),
    }
    answer |= unanswered(record) if record.assessment is None else _findings(record.assessment, pictured)
    if (erasure := record.erasure) is not None:
        answer["erasure"] = {
            "receipt_id": str(erasure.receipt_id),
            "erased_at": format_time(erasure.erased_at),
            "reason": erasure.reason,
        }
    if record.identity is not None:
        answer["identity"] = identity_answer(record.identity)
    if pms_url is not None and record.encounter_id is not None:
        answer["links"] = {"encounter": encounter_url(pms_url, record.encounter_id)}
    return answer


def identity_answer(identity: Confirmation) -> dict[str, str]:
    """That a clinician said of an image that it is of its lesion."""
    return {"confirmed_by": identity.confirmed_by, "confirmed_at": format_time(identity.confirmed_at)}


def demand_answer(demand: OpenDemand | None) -> dict[str, str] | None:
    """What a lesion demands that no clinician has answered."""
    if demand is None:
        return None
    return {
        "level": demand.level,
        "urgency": demand.urgency,
        "image_id": str(demand.image_id),
        "assessment_id": str(demand.assessment_id),
        "since": format_time(demand.since),
    }


def encounter_url(pms_url: str, encounter_id: str) -> str:
    """Where the PMS has an encounter."""
    return f"{pms_url}/api/encounters/{quote(encounter_id, safe='')}"


def references_of(*found: ImageRecord | Neighbours) -> set[str]:
    """The isic_ids of every reference that answers made of these name."""
    parts = [part.assessment if isinstance(part, ImageRecord) else part for part in found]
    neighbours = [part.neighbours if isinstance(part, Assessment) else part for part in parts]
    cases = [case for part in parts if part is not None for case in part.similar]
    cases += [
        case for part in neighbours if part for case in (part.nearest_benign, part.nearest_malignant) if case
    ]
    return {case.isic_id for case in cases}


def timeline_answer(
    timeline: LesionTimeline, *, pictured: Collection[str], pms_url: str | None = None
) -> dict[str, Any]:
    """A lesion with every image and assessment, newest first."""
    return {
        "lesion_id": str(timeline.lesion_id),
        "patient_id": timeline.patient_id,
        "created_at": format_time(timeline.created_at),
        "open_demand": demand_answer(timeline.open_demand),
        "assessments": [
            assessment_answer(
                record,
                lesion_id=timeline.lesion_id,
                patient_id=timeline.patient_id,
                pictured=pictured,
                pms_url=pms_url,
            )
            for record in timeline.images
        ],
    }


def similar_answer(
    neighbours: Neighbours,
    *,
    lesion_id: UUID,
    image_id: UUID,
    embedding_space: str,
    pictured: Collection[str],
) -> dict[str, Any]:
    """The references that a search with an image found, in the shapes of the image's own answer."""
    return {
        "lesion_id": str(lesion_id),
        "image_id": str(image_id),
        "embedding_space": embedding_space,
        "similar": [_similar(case, pictured) for case in neighbours.similar],
        "neighbours": _neighbours(neighbours, pictured),
    }


def summary_answer(summary: LesionSummary) -> dict[str, Any]:
    """A lesion as the worklist shows it: its newest image and what came of it."""
    latest, assessment = summary.latest, summary.latest.assessment
    risk = assessment.risk if assessment else None
    return {
        "lesion_id": str(summary.lesion_id),
        "patient_id": summary.patient_id,
        "created_at": format_time(summary.created_at),
        "open_demand": demand_answer(summary.open_demand),
        "latest": {
            "image_id": str(latest.image_id),
            "assessment_id": str(latest.assessment_id),
            "created_at": format_time(latest.created_at),
            "outcome": latest.outcome,
            "risk": {"level": risk.level, "urgency": risk.urgency} if risk else None,
        },
    }


def _findings(assessment: Assessment, pictured: Collection[str]) -> dict[str, Any]:
    return {
        "outcome": assessment.outcome,
        "reasons": [asdict(reason) for reason in assessment.reasons],
        "quality": asdict(assessment.quality),
        "classification": _classification(assessment.classification),
        "risk": asdict(assessment.risk) if assessment.risk else None,
        "similar": [_similar(case, pictured) for case in assessment.similar],
        "neighbours": _neighbours(assessment.neighbours, pictured),
        "change": asdict(assessment.change) if assessment.change else None,
        "provenance": asdict(assessment.provenance),
        "timings_ms": dict(assessment.timings_ms),
    }


def _classification(classification: Classification | None) -> dict[str, Any] | None:
    if classification is None:
        return None
    probabilities = classification.probabilities
    return {
        "probabilities": {diagnosis: probabilities[diagnosis] for diagnosis in Diagnosis},
        "top3": [
            {"diagnosis": d, "name": d.display_name, "probability": probabilities[d]}
            for d in classification.top3
        ],
        "prediction_set": list(classification.prediction_set),
        "coverage": classification.coverage,
        "ood_score": classification.ood_score,
    }


def _neighbours(neighbours: Neighbours | None, pictured: Collection[str]) -> dict[str, Any] | None:
    if neighbours is None:
        return None
    benign, malignant = neighbours.nearest_benign, neighbours.nearest_malignant
    return {
        "malignant_share": neighbours.malignant_share,
        "nearest_benign": _similar(benign, pictured) if benign else None,
        "nearest_malignant": _similar(malignant, pictured) if malignant else None,
    }


def _similar(case: SimilarCase, pictured: Collection[str]) -> dict[str, Any]:
    image_url = reference_url(case.isic_id) if case.isic_id in pictured else None
    return asdict(case) | {"image_url": image_url, "archive_url": archive_url(case.isic_id)}


_NO_FINDINGS: dict[str, Any] = {
    "quality": None,
    "classification": None,
    "risk": None,
    "similar": [],
    "neighbours": None,
    "change": None,
    "provenance": None,
    "timings_ms": {},
}

#: Outcome: code, message and action.
_REASONS = {
    Outcome.PENDING: (
        "assessment_pending",
        "The image is stored; its assessment has not finished.",
        "Ask again at Location; do not send the image a second time.",
    ),
    Outcome.CANCELLED: (
        "assessment_cancelled",
        "The image was erased before its assessment had finished.",
        "Take a new image if the lesion is to be assessed.",
    ),
    Outcome.ERASED: (
        "image_erased",
        "The image was erased, and with it what was found on it.",
        "Take a new image if the lesion is to be assessed.",
    ),
}

#: Failure code: what it means. Other codes are ends that no version of this service has written yet.
_FAILURES = {
    "too_large": "The stored image is larger than this service takes today.",
    "image_too_small": "The stored image is smaller than this service takes today.",
    "unsupported_image": "The stored image is not of a kind that this service takes today.",
    "undecodable_image": "The stored image cannot be decoded.",
    "stage_failed": "A stage of the assessment does not answer for this image, while it does for others.",
    "internal": "The service fails on this image, while it answers others.",
    "integrity": "The stored image does not authenticate: it was altered, or its key is lost.",
}
_FAILED = "The stored image cannot be assessed."
_FAILED_ACTION = (
    "No assessment will come: judge the lesion without it, and send a new image as its follow-up."
)


def unanswered(record: ImageRecord) -> dict[str, Any]:
    """The part of an answer that depends on findings, of an image without any."""
    if record.failure is not None:
        code, message, action = record.failure, _FAILURES.get(record.failure, _FAILED), _FAILED_ACTION
    else:
        code, message, action = _REASONS[record.outcome]
    return {
        "outcome": record.outcome,
        "reasons": [{"code": code, "message": message, "action": action}],
        **_NO_FINDINGS,
    }

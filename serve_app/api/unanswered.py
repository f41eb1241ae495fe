"""What is said of an image that has no assessment: why, and what to do about it."""

from __future__ import annotations

from typing import Any

from serve_app.domain.assessment import Outcome
from serve_app.records.lesion_rows import ImageRecord

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

"""An audit event as the columns of `audit_events`: every query that writes one takes them in this order."""

from __future__ import annotations

from serve_app.security.attempt import attempt_of
from serve_app.security.audit import AuditEvent


def event_columns(event: AuditEvent) -> tuple[object, ...]:
    """Action, actor, outcome, patient, lesion, image, assessment, request id and detail.

    What rests on an emergency access says so: here, where every event passes, and nowhere else.
    """
    detail = dict(event.detail)
    attempt = attempt_of(event.request_id)
    if attempt is not None:
        attempt.recorded = True
        if attempt.emergency is not None:
            detail["emergency_access"] = str(attempt.emergency)
    return (
        event.action,
        event.actor,
        event.outcome,
        event.patient_id,
        event.lesion_id,
        event.image_id,
        event.assessment_id,
        event.request_id,
        detail,
    )

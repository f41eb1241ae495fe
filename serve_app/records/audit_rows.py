"""An audit event as the columns of `audit_events`: every query that writes one takes them in this order."""

from __future__ import annotations

from dataclasses import replace

from serve_app.security.access import requested_action
from serve_app.security.audit import AuditEvent
from serve_app.security.purpose import PURPOSE, purpose_of


def event_columns(event: AuditEvent) -> tuple[object, ...]:
    """Action, actor, outcome, patient, lesion, image, assessment, request id and detail.

    What rests on an emergency access says so, and every event what it was for: here, where all but the few pass that a
    statement writes itself.
    """
    attempt = requested_action(event.request_id)
    if attempt is not None:
        attempt.recorded = True
        if attempt.emergency is not None:
            event = replace(event, detail={**event.detail, "emergency_access": str(attempt.emergency)})
    purpose = purpose_of(event, attempt.principal.roles if attempt is not None else None)
    detail = dict(event.detail) if purpose is None else {**event.detail, PURPOSE: purpose}
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

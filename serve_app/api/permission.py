"""Every route's way to a patient: decide, and have a denial on record."""

from __future__ import annotations

from uuid import UUID

from serve_app.domain.errors import Forbidden, NotFound
from serve_app.records.lesion_rows import PatientAccess
from serve_app.records.lesions import LesionStore
from serve_app.security.access import Action, Circumstances, may, requested_action
from serve_app.security.audit import AuditEvent
from serve_app.security.tokens import Principal


async def require(
    records: LesionStore,
    principal: Principal,
    action: Action,
    *,
    patient_id: str | None,
    access: PatientAccess,
    request_id: str,
    lesion_id: UUID | None = None,
) -> None:
    """Return if the principal may do this for the patient; else record the denial and raise Forbidden.

    The caller reads the same words whether the patient is another's or does not exist. What rests
    on an emergency access is marked so from here on, in every event of the request.
    """
    decision = may(principal, action, Circumstances(assigned=access.assigned, emergency=access.emergency))
    attempt = requested_action(request_id)
    if attempt is not None:
        attempt.patient_id, attempt.lesion_id = patient_id, lesion_id
        attempt.emergency = decision.emergency
    if decision:
        return
    await records.record_event(
        AuditEvent(
            action=action,
            actor=principal.subject,
            outcome="denied",
            patient_id=patient_id,
            lesion_id=lesion_id,
            request_id=request_id,
            detail={"reason": decision.reason},
        )
    )
    raise Forbidden


async def require_lesion(
    records: LesionStore, principal: Principal, action: Action, *, lesion_id: UUID, request_id: str
) -> str:
    """Permit access to a lesion by its patient, and name that.

    An unknown lesion is denied like a stranger's: Forbidden, and on record. Only who may do this
    for any patient learns that it is unknown: NotFound.
    """
    access = await records.access(principal.subject, None, lesion_id)
    await require(
        records,
        principal,
        action,
        patient_id=access.lesion_patient,
        access=access,
        request_id=request_id,
        lesion_id=lesion_id,
    )
    if access.lesion_patient is None:
        raise NotFound
    return access.lesion_patient

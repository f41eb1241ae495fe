"""Every route's one door to a patient: decide, and have a denial on record."""

from __future__ import annotations

from uuid import UUID

from serve_app.domain.errors import Forbidden
from serve_app.records.lesions import LesionStore
from serve_app.security.access import Action, may
from serve_app.security.audit import AuditEvent
from serve_app.security.tokens import Principal


async def require(
    records: LesionStore,
    principal: Principal,
    action: Action,
    *,
    patient_id: str | None,
    assigned: bool,
    request_id: str,
    lesion_id: UUID | None = None,
) -> None:
    """Return if the principal may do this; else record the denial and raise Forbidden.

    The caller reads the same words whether the patient is another's or does not exist.
    """
    decision = may(principal, action, assigned=assigned)
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

    An unknown lesion is denied like a stranger's: Forbidden, and on record.
    """
    access = await records.access(principal.subject, None, lesion_id)
    await require(
        records,
        principal,
        action,
        patient_id=access.lesion_patient,
        assigned=access.assigned,
        request_id=request_id,
        lesion_id=lesion_id,
    )
    if access.lesion_patient is None:
        raise Forbidden
    return access.lesion_patient

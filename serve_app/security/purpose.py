"""What an action was for: HL7 v3 PurposeOfUse, kept with each audit event, in the detail that the chain hashes.

https://terminology.hl7.org/ValueSet-v3-PurposeOfUse.html. A request states no purpose; it follows from the action and
from the role of the principal, by the tables here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from serve_app.security.access import Action, Role
from serve_app.security.audit import AuditEvent
from serve_app.security.receipts import ErasureReason

#: The key of an event's detail that holds its purpose; events from before there was one have none.
PURPOSE = "purpose"


class Purpose(StrEnum):
    """Codes of http://terminology.hl7.org/CodeSystem/v3-ActReason."""

    TREATMENT = "TREAT"
    EMERGENCY_TREATMENT = "ETREAT"
    HEALTHCARE_OPERATIONS = "HOPERAT"
    SYSTEM_ADMINISTRATION = "HSYSADMIN"
    PATIENT_REQUEST = "PATRQT"
    COMPLIANCE = "HCOMPL"
    LEGAL = "HLEGAL"


#: Actions that have one purpose in every role. The PMS is told so that the hospital's own record is complete.
_BY_ACTION: Mapping[str, Purpose] = MappingProxyType(
    {
        Action.BREAK_GLASS: Purpose.EMERGENCY_TREATMENT,
        Action.REVIEW_ACCESS: Purpose.COMPLIANCE,
        Action.READ_AUDIT: Purpose.COMPLIANCE,
        Action.EXPORT: Purpose.COMPLIANCE,
        "classify": Purpose.TREATMENT,
        "disclose": Purpose.HEALTHCARE_OPERATIONS,
        "record_close": Purpose.HEALTHCARE_OPERATIONS,
        "record_reopen": Purpose.HEALTHCARE_OPERATIONS,
        "hold_set": Purpose.LEGAL,
        "hold_release": Purpose.LEGAL,
    }
)

#: Why an image is erased. `erase_image` in the migrations says the same of the event that it writes itself.
_BY_REASON: Mapping[str, Purpose] = MappingProxyType(
    {
        ErasureReason.PATIENT_REQUEST: Purpose.PATIENT_REQUEST,
        ErasureReason.CONSENT_WITHDRAWN: Purpose.PATIENT_REQUEST,
        ErasureReason.WRONG_PATIENT: Purpose.HEALTHCARE_OPERATIONS,
        ErasureReason.UPLOADED_IN_ERROR: Purpose.HEALTHCARE_OPERATIONS,
        ErasureReason.RETENTION: Purpose.HEALTHCARE_OPERATIONS,
    }
)
_ERASURES = frozenset({Action.ERASE, "erased"})

#: All other actions of a principal: by the first of these roles that it has.
_BY_ROLE: Mapping[str, Purpose] = MappingProxyType(
    {
        Role.CLINICIAN: Purpose.TREATMENT,
        Role.PMS_SERVICE: Purpose.TREATMENT,
        Role.SUPERVISOR: Purpose.HEALTHCARE_OPERATIONS,
        Role.AUDITOR: Purpose.COMPLIANCE,
        Role.OPERATOR: Purpose.SYSTEM_ADMINISTRATION,
    }
)


def purpose_of(event: AuditEvent, roles: frozenset[str] | None = None) -> Purpose | None:
    """Say what an action was for; `roles` are the principal's, None where it was no request.

    None where nobody is known who could have had a purpose: a request without a valid token, or a principal
    without a role that means something here.
    """
    if "emergency_access" in event.detail:
        return Purpose.EMERGENCY_TREATMENT
    if event.action in _ERASURES:
        return _BY_REASON.get(str(event.detail.get("reason")), Purpose.HEALTHCARE_OPERATIONS)
    if event.action in _BY_ACTION:
        return _BY_ACTION[event.action]
    if roles is not None:
        return next((purpose for role, purpose in _BY_ROLE.items() if role in roles), None)
    # What no token stands behind is done by the account of an operator.
    return Purpose.SYSTEM_ADMINISTRATION if event.actor.startswith("os:") else None


def recorded_purpose(event: AuditEvent) -> Purpose | None:
    """The purpose that an event was recorded with; None for events from before there was one."""
    recorded = event.detail.get(PURPOSE)
    return next((purpose for purpose in Purpose if purpose == recorded), None)

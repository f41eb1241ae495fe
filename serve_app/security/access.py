"""Who may do what for a patient: what is not granted here is denied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from serve_app.security.tokens import Principal


class Action(StrEnum):
    """What can be done with a patient's lesions; the same word stands in the audit log."""

    UPLOAD = "upload"
    READ = "read"
    DOWNLOAD = "download"
    LIST = "list"
    REPLAY = "replay"


class Role(StrEnum):
    """The roles of a token's `roles` claim that mean something here; any other grants nothing."""

    CLINICIAN = "clinician"
    PMS_SERVICE = "pms_service"


#: What each role may do for a patient assigned to it. The PMS works with assessments; the
#: original image is for the clinician who looks at it.
GRANTS: Mapping[Role, frozenset[Action]] = MappingProxyType(
    {
        Role.CLINICIAN: frozenset({Action.UPLOAD, Action.READ, Action.DOWNLOAD, Action.LIST, Action.REPLAY}),
        Role.PMS_SERVICE: frozenset({Action.UPLOAD, Action.READ, Action.LIST, Action.REPLAY}),
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why in one stable code: for the audit log, never for the caller."""

    allowed: bool
    reason: str

    def __bool__(self) -> bool:
        """Read `if may(...)` as it sounds."""
        return self.allowed


def may(principal: Principal, action: Action, *, assigned: bool) -> Decision:
    """Decide whether the principal may do this for a patient.

    `assigned`: a care assignment of this principal to the patient is in force. A decision
    that allows names the role that does; one that denies is `role` or `assignment`.
    """
    granting = [role for role, actions in GRANTS.items() if role in principal.roles and action in actions]
    if not granting:
        return Decision(allowed=False, reason="role")
    if not assigned:
        return Decision(allowed=False, reason="assignment")
    return Decision(allowed=True, reason=granting[0].value)

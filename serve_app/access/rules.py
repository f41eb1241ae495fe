"""Who may do what, and what for: one decision for every route, and what is not granted here is denied."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType
from uuid import UUID

from serve_app.audit.events import AuditEvent, AuditOutcome, event_about, is_own_actor
from serve_app.keys.receipts import ErasureReason


@dataclass(frozen=True, slots=True)
class Principal:
    """The caller: `subject` is unique at the issuer, and a name that `check_subject` (tokens.py) lets pass.

    `token_id` is the token's own `jti`, by which it alone can be revoked; not every issuer gives one.
    Whichever token it comes with, a principal is the same.
    """

    subject: str
    roles: frozenset[str]
    token_id: str | None = field(default=None, compare=False)


class Action(StrEnum):
    """What can be asked for; the same word stands in the OpenAPI document (`x-action`) and in the audit log."""

    UPLOAD = "upload"
    READ = "read"
    DOWNLOAD = "download"
    LIST = "list"
    REPLAY = "replay"
    CONFIRM = "confirm"
    REVIEW = "review"
    RECORD_OUTCOME = "record_outcome"
    LINK = "link"
    UNLINK = "unlink"
    READ_REPORT = "read_report"
    ERASE = "erase"
    READ_RECEIPT = "read_receipt"
    VIEW_WORKLIST = "view_worklist"
    VIEW_STATISTICS = "view_statistics"
    HOLD = "hold"
    EXPORT = "export"
    BREAK_GLASS = "break_glass"
    REVIEW_ACCESS = "review_access"
    READ_AUDIT = "read_audit"
    VIEW_REFERENCE = "view_reference"
    VIEW_MODELS = "view_models"
    DESCRIBE = "describe"
    OBSERVE = "observe"


class Role(StrEnum):
    """The roles of a token's `roles` claim that mean something here; any other grants nothing."""

    CLINICIAN = "clinician"
    SUPERVISOR = "supervisor"
    AUDITOR = "auditor"
    OPERATOR = "operator"
    PMS_SERVICE = "pms_service"


class Reach(Enum):
    """For whom a grant holds."""

    #: Patients in this principal's care, by an assignment or by an emergency access.
    CARE = "in care, or in an emergency"
    #: Patients in this principal's care by an assignment; an emergency never needs it.
    ASSIGNED = "in care"
    #: Any patient, or data that is not of a patient.
    ANY = "any"


_OPEN = dict.fromkeys((Action.VIEW_REFERENCE, Action.VIEW_MODELS, Action.DESCRIBE), Reach.ANY)
_LOOK = (Action.READ, Action.DOWNLOAD, Action.LIST, Action.REPLAY, Action.READ_REPORT)
_PMS = (
    Action.READ,
    Action.LIST,
    Action.REPLAY,
    Action.READ_REPORT,
    Action.UPLOAD,
    Action.ERASE,
    Action.READ_RECEIPT,
)
#: What a clinician says of a lesion; nobody else may.
_SAY = (Action.UPLOAD, Action.CONFIRM, Action.REVIEW, Action.RECORD_OUTCOME, Action.LINK, Action.UNLINK)
_REVIEW = dict.fromkeys((Action.READ_RECEIPT, Action.REVIEW_ACCESS), Reach.ANY)

#: What each role may do, and for whom. The PMS works with assessments; only clinicians and supervisors see the
#: original image. Erasure is final, so no clinician may order it: a supervisor may, for any patient, and the PMS,
#: where a patient's request arrives and is approved, for the patients it is assigned to. A receipt names no
#: patient: those who may erase, and auditors, may read any. An auditor has no patients.
GRANTS: Mapping[Role, Mapping[Action, Reach]] = MappingProxyType(
    {
        Role.CLINICIAN: {
            **_OPEN,
            **dict.fromkeys((*_LOOK, *_SAY, Action.READ_RECEIPT), Reach.CARE),
            # The worklist holds none but the patients in the caller's own care.
            **dict.fromkeys((Action.BREAK_GLASS, Action.VIEW_WORKLIST), Reach.ANY),
        },
        Role.SUPERVISOR: {
            **_OPEN,
            **_REVIEW,
            **dict.fromkeys(_LOOK, Reach.CARE),
            **dict.fromkeys((Action.BREAK_GLASS, Action.ERASE, Action.HOLD), Reach.ANY),
            **dict.fromkeys((Action.VIEW_WORKLIST, Action.VIEW_STATISTICS), Reach.ANY),
        },
        Role.AUDITOR: {
            **_OPEN,
            **_REVIEW,
            **dict.fromkeys((Action.READ_AUDIT, Action.EXPORT, Action.VIEW_STATISTICS), Reach.ANY),
        },
        Role.OPERATOR: {**_OPEN, Action.OBSERVE: Reach.ANY, Action.VIEW_STATISTICS: Reach.ANY},
        Role.PMS_SERVICE: {**_OPEN, **dict.fromkeys(_PMS, Reach.ASSIGNED)},
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """Yes or no, and why in one stable code: for the audit log, never for the caller.

    `emergency` is the emergency access that a yes rests on, and on nothing else.
    """

    allowed: bool
    reason: str
    emergency: UUID | None = None

    def __bool__(self) -> bool:
        """True when it is allowed, so that `if may(...)` works."""
        return self.allowed


def may(
    principal: Principal,
    action: Action,
    *,
    assigned: bool = False,
    emergency: UUID | None = None,
    own: bool = False,
) -> Decision:
    """Decide whether the principal may do this; with nothing known of the circumstances, least is allowed.

    `assigned`: a care assignment of the principal to the patient is in force. `emergency`: the emergency
    access that is, if any. `own`: what is to be judged is the principal's own doing.
    A decision that allows names the role that does; one that denies is `role` (no role of the
    principal grants the action to anyone), `own`, or `assignment`. An assignment goes before an
    emergency access: only what needed the emergency is put down to it.
    """
    reaches = {
        role: GRANTS[role][action] for role in Role if role in principal.roles and action in GRANTS[role]
    }
    if not reaches:
        return Decision(allowed=False, reason="role")
    if own:
        return Decision(allowed=False, reason="own")
    for role, reach in reaches.items():
        if reach is Reach.ANY or assigned:
            return Decision(allowed=True, reason=role.value)
    for role, reach in reaches.items():
        if reach is Reach.CARE and emergency is not None:
            return Decision(allowed=True, reason=role.value, emergency=emergency)
    return Decision(allowed=False, reason="assignment")


@dataclass(slots=True)
class RequestedAction:
    """What the request under way asks for, and who asks; the ids are filled in as they become known.

    Kept while it is under way, so that every event written for it names the emergency access that it rests on
    (`emergency`), and so that a failure is recorded once, whichever route it is in (`recorded`: an event was written).
    """

    principal: Principal
    action: str
    request_id: str
    patient_id: str | None = None
    lesion_id: UUID | None = None
    image_id: UUID | None = None
    assessment_id: UUID | None = None
    emergency: UUID | None = None
    recorded: bool = False

    @property
    def actor(self) -> str:
        """Who asks, as events name them."""
        return self.principal.subject

    def event(self, outcome: AuditOutcome, /, **detail: object) -> AuditEvent:
        """Say how it ended; `detail` holds codes and ids only."""
        return event_about(self, self.action, outcome, detail)


_current: ContextVar[RequestedAction | None] = ContextVar("requested_action", default=None)


def begin(requested: RequestedAction | None) -> None:
    """Keep what this request asks for; None where nobody is known yet."""
    _current.set(requested)


def requested_action(request_id: str) -> RequestedAction | None:
    """What the request of this id asks for, while it is under way here; None for events of anything else."""
    requested = _current.get()
    return requested if requested is not None and requested.request_id == request_id else None


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
    {Action.BREAK_GLASS: Purpose.EMERGENCY_TREATMENT}
    | dict.fromkeys(("classify", "hook_feedback"), Purpose.TREATMENT)
    | dict.fromkeys((Action.REVIEW_ACCESS, Action.READ_AUDIT, Action.EXPORT), Purpose.COMPLIANCE)
    | dict.fromkeys(("disclose", "record_close", "record_reopen"), Purpose.HEALTHCARE_OPERATIONS)
    | dict.fromkeys(("hold_set", "hold_release"), Purpose.LEGAL)
)

#: Why an image is erased where a patient wants it; everything else is the house's own business. `erase_image` in the
#: migrations says the same of the event that it writes itself.
_PATIENTS_WISH = frozenset({ErasureReason.PATIENT_REQUEST, ErasureReason.CONSENT_WITHDRAWN})
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
        wished = event.detail.get("reason") in _PATIENTS_WISH
        return Purpose.PATIENT_REQUEST if wished else Purpose.HEALTHCARE_OPERATIONS
    if event.action in _BY_ACTION:
        return _BY_ACTION[event.action]
    if roles is not None:
        return next((purpose for role, purpose in _BY_ROLE.items() if role in roles), None)
    # What no token stands behind is done by the account of an operator.
    return Purpose.SYSTEM_ADMINISTRATION if is_own_actor(event.actor) else None


def recorded_purpose(event: AuditEvent) -> Purpose | None:
    """The purpose that an event was recorded with; None for events from before there was one."""
    return next((purpose for purpose in Purpose if purpose == event.detail.get(PURPOSE)), None)

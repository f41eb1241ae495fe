"""Audit events as FHIR R4 AuditEvent, after IHE's Basic Audit Log Patterns (BALP 1.1.4).

https://profiles.ihe.net/ITI/BALP: a success that is a RESTful create, read, query or delete of a patient's data names
its profile. BALP profiles successes only, so a denial or failure is a plain AuditEvent, as is what is no RESTful
operation (keys, models, exports). The client's network address is not in our log: HAProxy is in between.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
import json
from types import MappingProxyType
from typing import Any

from serve_app.access.rules import PURPOSE, Purpose, recorded_purpose
from serve_app.audit.events import AuditEvent, is_own_actor
from serve_app.fhir.codes import OWN, TERMS, coding, concept

_BALP = "https://profiles.ihe.net/ITI/BALP"
_DCM = "http://dicom.nema.org/resources/ontology/DCM"
_REST = "http://hl7.org/fhir/restful-interaction"
_PARTICIPATION = f"{TERMS}/v3-ParticipationType"
_ABSENT = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"

#: FHIR's outcome codes: success, minor failure (the caller may try again), serious failure (refused).
_OUTCOMES = MappingProxyType({"success": "0", "failed": "4", "denied": "8"})


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How an action maps: FHIR's `action`, the REST interaction, BALP's profile for a success with a patient."""

    action: str
    interaction: str | None = None
    profile: str | None = None


_PATTERNS: Mapping[str, _Pattern] = MappingProxyType(
    {
        **dict.fromkeys(
            ("upload", "review", "record_outcome", "link", "unlink"),
            _Pattern("C", "create", "IHE.BasicAudit.PatientCreate"),
        ),
        "read": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "read_report": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "read_receipt": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "download": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "list": _Pattern("E", "search", "IHE.BasicAudit.PatientQuery"),
        "erase": _Pattern("D", "delete", "IHE.BasicAudit.PatientDelete"),
        "export": _Pattern("R"),
    }
)
_OTHER = _Pattern("E")


def audit_event_resource(
    event: AuditEvent, *, event_id: int, recorded_at: datetime, server: str
) -> dict[str, Any]:
    """Make one AuditEvent resource; `server` is what recorded the event.

    Its purpose is the one that was recorded. An event from before there was one claims none, unless it rested
    on an emergency access, which was always recorded.
    """
    purpose = recorded_purpose(event)
    if purpose is None and "emergency_access" in event.detail:
        purpose = Purpose.EMERGENCY_TREATMENT
    reason = [concept(coding(f"{TERMS}/v3-ActReason", purpose))] if purpose is not None else []
    pattern = _PATTERNS.get(event.action, _OTHER)
    profiled = pattern.profile is not None and event.outcome == "success" and event.patient_id is not None
    kind = coding(_DCM, "110100", "Application Activity")
    if pattern.interaction:
        kind = coding(f"{TERMS}/audit-event-type", "rest", "Restful Operation")
    elif event.action == "export":
        kind = coding(_DCM, "110106", "Export")
    resource: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": str(event_id),
        "type": kind,
        "subtype": [
            *([coding(_REST, pattern.interaction)] if pattern.interaction else []),
            coding(f"{OWN}:action", event.action),
        ],
        "action": pattern.action,
        "recorded": recorded_at.astimezone(UTC).isoformat(),
        "outcome": _OUTCOMES[event.outcome],
        "agent": _agents(event, pattern, reason, server),
        "source": {
            "site": server,
            "observer": {"display": server},
            "type": [coding(f"{TERMS}/security-source-type", "4", "Application Server")],
        },
        "entity": _entities(event, query=profiled and pattern.interaction == "search"),
    }
    if profiled:
        resource["meta"] = {"profile": [f"{_BALP}/StructureDefinition/{pattern.profile}"]}
    if event.outcome != "success":
        resource["outcomeDesc"] = str(event.detail.get("reason") or event.detail.get("code") or event.outcome)
    if reason:
        resource["purposeOfEvent"] = reason
    return resource


def _agents(
    event: AuditEvent, pattern: _Pattern, reason: list[dict[str, Any]], server: str
) -> list[dict[str, Any]]:
    """The client, the server and the user; what BALP calls the machines depends on where the data flow."""
    sender = concept(coding(_DCM, "110153", "Source Role ID"))
    receiver = concept(coding(_DCM, "110152", "Destination Role ID"))
    machines = {
        "delete": (  # no data flow
            concept(coding(_DCM, "110150", "Application")),
            concept(coding(f"{TERMS}/provenance-participant-type", "custodian", "Custodian")),
        ),
        "read": (receiver, sender),
    }.get(pattern.interaction or "", (sender, receiver))
    writes = pattern.interaction in {"create", "delete"}
    user = ("AUT", "author") if writes else ("IRCP", "information recipient")
    # A command's account, and the service where it does what is due, have no client but the node itself.
    alone = is_own_actor(event.actor)
    return [
        {
            "type": machines[0],
            "who": {"display": server if alone else "client of the interface"},
            "requestor": False,
            "network": {"extension": [{"url": _ABSENT, "valueCode": "unknown"}]},
        },
        {
            "type": machines[1],
            "who": {"display": server},
            "requestor": False,
            "network": {"address": server, "type": "1"},
        },
        {
            "type": concept(coding(_PARTICIPATION, *user)),
            "who": {"identifier": {"system": f"{OWN}:subject", "value": event.actor}},
            "requestor": True,
            **({"purposeOfUse": reason} if reason else {}),
        },
    ]


def _entities(event: AuditEvent, *, query: bool) -> list[dict[str, Any]]:
    entities: list[dict[str, Any]] = [
        {
            "type": coding(f"{_BALP}/CodeSystem/BasicAuditEntityType", "XrequestId"),
            "what": {"identifier": {"value": event.request_id}},
        }
    ]
    shown: Any = event.detail.get("shown", {})  # a worklist's patients
    for patient_id in shown if event.patient_id is None else (event.patient_id,):
        patient = {"type": "Patient", "identifier": {"system": f"{OWN}:patient", "value": patient_id}}
        entities.append(
            {
                "type": coding(f"{TERMS}/audit-entity-type", "1", "Person"),
                "role": coding(f"{TERMS}/object-role", "1", "Patient"),
                "what": patient,
            }
        )
    system_object = coding(f"{TERMS}/audit-entity-type", "2", "System Object")
    if query:
        asked = b64encode(f"GET /api/lesions?patient_id={event.patient_id}".encode()).decode()
        role = coding(f"{TERMS}/object-role", "24", "Query")
        return [*entities, {"type": system_object, "role": role, "query": asked}]
    # What the event was about: the most exact of its ids; without one, the action itself.
    ids = {"assessment": event.assessment_id, "image": event.image_id, "lesion": event.lesion_id}
    name, value = next(((name, found) for name, found in ids.items() if found), ("action", event.action))
    data = {
        "type": system_object,
        "role": coding(f"{TERMS}/object-role", "4", "Domain Resource"),
        "what": {"identifier": {"system": f"{OWN}:{name}", "value": str(value)}},
    }
    rest = {name: value for name, value in event.detail.items() if name != PURPOSE}
    if rest:
        # Codes and ids, as the audit log has them: more than FHIR has a place for.
        data["detail"] = [{"type": "detail", "valueString": json.dumps(rest, sort_keys=True)}]
    return [*entities, data]

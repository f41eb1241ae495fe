"""Audit events as FHIR R4 AuditEvent, after IHE's Basic Audit Log Patterns (BALP 1.1.4).

https://profiles.ihe.net/ITI/BALP: a success that is a RESTful create, read or query of a patient's data names
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

from serve_app.security.audit import AuditEvent

_BALP = "https://profiles.ihe.net/ITI/BALP"
_TERMS = "http://terminology.hl7.org/CodeSystem"
_DCM = "http://dicom.nema.org/resources/ontology/DCM"
_REST = "http://hl7.org/fhir/restful-interaction"
_PARTICIPATION = f"{_TERMS}/v3-ParticipationType"
_ABSENT = "http://hl7.org/fhir/StructureDefinition/data-absent-reason"
_OWN = "urn:derm-cds"

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
        "upload": _Pattern("C", "create", "IHE.BasicAudit.PatientCreate"),
        "read": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "read_receipt": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "download": _Pattern("R", "read", "IHE.BasicAudit.PatientRead"),
        "list": _Pattern("E", "search", "IHE.BasicAudit.PatientQuery"),
        "replay": _Pattern("E"),
        "classify": _Pattern("E"),
        "erase": _Pattern("D", "delete"),
        "export": _Pattern("R"),
    }
)
_OTHER = _Pattern("E")

#: Codes of HL7 v3 PurposeOfUse (terminology.hl7.org/ValueSet-v3-PurposeOfUse): treatment, emergency treatment.
_TREATMENT, _EMERGENCY = "TREAT", "ETREAT"


def audit_event_resource(
    event: AuditEvent, *, event_id: int, recorded_at: datetime, server: str
) -> dict[str, Any]:
    """Make one AuditEvent resource; `server` is what recorded the event.

    Its purpose is TREAT, or ETREAT for the opening of an emergency access and for all that rested on it.
    """
    purpose = _EMERGENCY if "emergency_access" in event.detail else _TREATMENT
    pattern = _PATTERNS.get(event.action, _OTHER)
    profiled = pattern.profile is not None and event.outcome == "success" and event.patient_id is not None
    resource: dict[str, Any] = {
        "resourceType": "AuditEvent",
        "id": str(event_id),
        "type": _coding(f"{_TERMS}/audit-event-type", "rest", "Restful Operation")
        if pattern.interaction
        else _coding(_DCM, "110106", "Export")
        if event.action == "export"
        else _coding(_DCM, "110100", "Application Activity"),
        "subtype": [
            *([_coding(_REST, pattern.interaction)] if pattern.interaction else []),
            _coding(f"{_OWN}:action", event.action),
        ],
        "action": pattern.action,
        "recorded": recorded_at.astimezone(UTC).isoformat(),
        "outcome": _OUTCOMES[event.outcome],
        "agent": _agents(event, pattern, purpose, server),
        "source": {
            "site": server,
            "observer": {"display": server},
            "type": [_coding(f"{_TERMS}/security-source-type", "4", "Application Server")],
        },
        "entity": _entities(event, query=profiled and pattern.interaction == "search"),
    }
    if profiled:
        resource["meta"] = {"profile": [f"{_BALP}/StructureDefinition/{pattern.profile}"]}
    if event.outcome != "success":
        resource["outcomeDesc"] = str(event.detail.get("reason") or event.detail.get("code") or event.outcome)
    if event.patient_id is not None:
        resource["purposeOfEvent"] = [_concept(f"{_TERMS}/v3-ActReason", purpose)]
    return resource


def _agents(event: AuditEvent, pattern: _Pattern, purpose: str, server: str) -> list[dict[str, Any]]:
    # DICOM's words: data of a read flows from the server to the client, of everything else the other way.
    reads = pattern.interaction == "read"
    source, destination = ("110153", "Source Role ID"), ("110152", "Destination Role ID")
    client_role, server_role = (destination, source) if reads else (source, destination)
    user = ("AUT", "author") if pattern.interaction == "create" else ("IRCP", "information recipient")
    subject = {"identifier": {"system": f"{_OWN}:subject", "value": event.actor}}
    return [
        {
            "type": _concept(_DCM, *client_role),
            "who": {"display": "client of the interface"},
            "requestor": False,
            "network": {"extension": [{"url": _ABSENT, "valueCode": "unknown"}]},
        },
        {
            "type": _concept(_DCM, *server_role),
            "who": {"display": server},
            "requestor": False,
            "network": {"address": server, "type": "1"},
        },
        {
            "type": _concept(_PARTICIPATION, *user),
            "who": subject,
            "requestor": True,
            **({"purposeOfUse": [_concept(f"{_TERMS}/v3-ActReason", purpose)]} if event.patient_id else {}),
        },
    ]


def _entities(event: AuditEvent, *, query: bool) -> list[dict[str, Any]]:
    entities: list[dict[str, Any]] = [
        {
            "type": _coding(f"{_BALP}/CodeSystem/BasicAuditEntityType", "XrequestId"),
            "what": {"identifier": {"value": event.request_id}},
        }
    ]
    if event.patient_id is not None:
        patient = {"type": "Patient", "identifier": {"system": f"{_OWN}:patient", "value": event.patient_id}}
        entities.append(
            {
                "type": _coding(f"{_TERMS}/audit-entity-type", "1", "Person"),
                "role": _coding(f"{_TERMS}/object-role", "1", "Patient"),
                "what": patient,
            }
        )
    system_object = _coding(f"{_TERMS}/audit-entity-type", "2", "System Object")
    if query:
        asked = b64encode(f"GET /api/lesions?patient_id={event.patient_id}".encode()).decode()
        role = _coding(f"{_TERMS}/object-role", "24", "Query")
        return [*entities, {"type": system_object, "role": role, "query": asked}]
    data = {
        "type": system_object,
        "role": _coding(f"{_TERMS}/object-role", "4", "Domain Resource"),
        "what": {"identifier": {"system": f"{_OWN}:{_object(event)[0]}", "value": _object(event)[1]}},
    }
    if event.detail:
        # Codes and ids, as the audit log has them: more than FHIR has a place for.
        data["detail"] = [{"type": "detail", "valueString": json.dumps(event.detail, sort_keys=True)}]
    return [*entities, data]


def _object(event: AuditEvent) -> tuple[str, str]:
    """What the event was about: the most exact of its ids; without one, the action itself."""
    for name in ("assessment_id", "image_id", "lesion_id"):
        if (value := getattr(event, name)) is not None:
            return name.removesuffix("_id"), str(value)
    return "action", event.action


def _coding(system: str, code: str, display: str = "") -> dict[str, str]:
    return {"system": system, "code": code, **({"display": display} if display else {})}


def _concept(system: str, code: str, display: str = "") -> dict[str, Any]:
    return {"coding": [_coding(system, code, display)]}

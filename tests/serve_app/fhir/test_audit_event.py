"""Audit events as FHIR: valid R4B, and in the shape of the BALP profile that a resource names."""

from __future__ import annotations

from base64 import b64decode
from datetime import UTC, datetime
import json
from uuid import UUID

import pytest

from serve_app.access.rules import Action
from serve_app.audit.events import AuditEvent
from serve_app.fhir.audit_event import audit_event_resource

_LESION = UUID(int=7)
_PATIENT_TYPE = "http://terminology.hl7.org/CodeSystem/audit-entity-type"
_PROFILES = {
    "upload": ("PatientCreate", "C", "create", "110153"),
    "read": ("PatientRead", "R", "read", "110152"),
    "read_report": ("PatientRead", "R", "read", "110152"),
    "read_receipt": ("PatientRead", "R", "read", "110152"),
    "download": ("PatientRead", "R", "read", "110152"),
    "list": ("PatientQuery", "E", "search", "110153"),
    "erase": ("PatientDelete", "D", "delete", "110150"),
}
_ACTIONS = sorted({*map(str, Action), "classify", "key_rotate", "an action of tomorrow"})


def resource(action: str, *, outcome: str = "success", patient: str | None = "PAT-1", **detail) -> dict:
    ids = {"request_id": "r-1", "patient_id": patient, "lesion_id": _LESION}
    event = AuditEvent(action=action, actor="dr", outcome=outcome, detail=detail, **ids)
    recorded = datetime(2026, 11, 24, 12, tzinfo=UTC)
    return audit_event_resource(event, event_id=5, recorded_at=recorded, server="node-1")


def entities(made: dict) -> dict[str, dict]:
    return {entity["type"]["code"]: entity for entity in made["entity"]}


@pytest.mark.parametrize("action", _ACTIONS)
def test_every_event_is_valid_r4b(action: str) -> None:
    fhir = pytest.importorskip("fhir.resources.R4B.auditevent", reason="fhir.resources is not installed")
    for patient, outcome in (("PAT-1", "success"), ("PAT-1", "failed"), (None, "success"), (None, "denied")):
        made = resource(action, outcome=outcome, patient=patient, code="x")
        valid = json.loads(fhir.AuditEvent.model_validate(made).model_dump_json())
        assert valid["resourceType"] == "AuditEvent"


@pytest.mark.parametrize("action", _PROFILES)
def test_a_success_is_of_its_profile(action: str) -> None:
    """What https://profiles.ihe.net/ITI/BALP fixes: type, subtype, action, outcome, agents and entities."""
    profile, verb, interaction, client = _PROFILES[action]
    made = resource(action, purpose="TREAT")
    balp = "https://profiles.ihe.net/ITI/BALP/StructureDefinition"
    assert made["meta"]["profile"] == [f"{balp}/IHE.BasicAudit.{profile}"]
    assert made["type"]["code"] == "rest"
    assert made["subtype"][0] == {"system": "http://hl7.org/fhir/restful-interaction", "code": interaction}
    assert (made["action"], made["outcome"]) == (verb, "0")
    machines = [agent for agent in made["agent"] if not agent["requestor"]]
    assert machines[0]["type"]["coding"][0]["code"] == client
    server = {"110150": "custodian", "110152": "110153", "110153": "110152"}[client]
    assert [agent["type"]["coding"][0]["code"] for agent in machines] == [client, server]
    assert all(agent["who"] and agent["network"] for agent in machines)
    (user,) = (agent for agent in made["agent"] if agent["requestor"])
    assert user["who"]["identifier"]["value"] == "dr"
    assert "network" not in user
    assert user["type"]["coding"][0]["code"] == ("AUT" if action in {"upload", "erase"} else "IRCP")
    assert user["purposeOfUse"][0]["coding"][0]["code"] == "TREAT"
    found = entities(made)
    assert found["1"]["what"]["identifier"]["value"] == "PAT-1"
    assert found["XrequestId"]["what"]["identifier"]["value"] == "r-1"
    if action == "list":
        assert b64decode(found["2"]["query"]).startswith(b"GET /api/lesions")
        assert "what" not in found["2"]
        assert "detail" not in found["2"]
    else:
        assert found["2"]["what"]["identifier"]["value"] == str(_LESION)
        assert found["2"]["role"]["code"] == "4"


def test_what_claims_no_profile_says_why_it_did_not_succeed() -> None:
    for outcome, code in (("denied", "8"), ("failed", "4")):
        made = resource("read", outcome=outcome, reason="assignment")
        assert "meta" not in made
        assert (made["outcome"], made["outcomeDesc"]) == (code, "assignment")
    without_patient = resource("read", patient=None)
    assert "meta" not in without_patient
    assert "1" not in entities(without_patient)
    for action in ("erased", "disclose", "hold_set", "replay", "review_access", "assign"):
        assert "meta" not in resource(action, purpose="HOPERAT")


@pytest.mark.parametrize("action", ["break_glass", "read"])
def test_what_rests_on_an_emergency_says_so_as_its_purpose(action: str) -> None:
    """Of those, too, that were recorded before events had a purpose."""
    made = resource(action, emergency_access="0198a3c0-0000-7000-8000-000000000001")
    (user,) = (agent for agent in made["agent"] if agent["requestor"])
    for (purpose,) in (user["purposeOfUse"], made["purposeOfEvent"]):
        (coding,) = purpose["coding"]
        assert coding == {"system": "http://terminology.hl7.org/CodeSystem/v3-ActReason", "code": "ETREAT"}


@pytest.mark.parametrize(
    ("action", "patient", "purpose"),
    [
        ("erase", "PAT-1", "PATRQT"),
        ("disclose", "PAT-1", "HOPERAT"),
        ("review_access", "PAT-1", "HCOMPL"),
        ("model_promote", None, "HSYSADMIN"),
    ],
)
def test_the_purpose_is_the_one_that_was_recorded(action: str, patient: str | None, purpose: str) -> None:
    made = resource(action, patient=patient, purpose=purpose, receipt_id="r")
    (user,) = (agent for agent in made["agent"] if agent["requestor"])
    assert user["purposeOfUse"] == made["purposeOfEvent"]
    assert made["purposeOfEvent"][0]["coding"][0]["code"] == purpose
    assert "purpose" not in json.loads(entities(made)["2"]["detail"][0]["valueString"])


def test_an_event_from_before_there_was_a_purpose_claims_none() -> None:
    made = resource("read")
    assert "purposeOfEvent" not in made
    assert all("purposeOfUse" not in agent for agent in made["agent"])
    assert made["meta"]["profile"]  # where a purpose is asked for, and not demanded


def test_everyone_whom_a_worklist_showed_is_an_entity() -> None:
    """Whoever asks a FHIR log who saw a patient finds it; under an emergency access the event has the one patient."""
    shown = {"PAT-1": [str(_LESION)], "PAT-2": [str(_LESION)]}
    for patient, named in ((None, ["PAT-1", "PAT-2"]), ("PAT-2", ["PAT-2"])):
        made = resource("view_worklist", patient=patient, shown=shown)
        found = [
            each["what"]["identifier"]["value"] for each in made["entity"] if each["type"]["code"] == "1"
        ]
        assert found == named

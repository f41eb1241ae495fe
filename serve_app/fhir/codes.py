"""What every resource is made of, and the only codes that a report may hold: each with where it was verified.

A code that is not in this table is not emitted: the word goes out as text, and in a code system of our own
(`urn:derm-cds:...`). tests/serve_app/fhir holds each code against its check digit and, where it has it, pydicom's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid5

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import AnatomSite

MEDIA_TYPE = "application/fhir+json"
Resource = dict[str, Any]

#: For ids that follow from the record's own (RFC 9562, version 5); never changed, or a PMS would file everything twice.
_NAMESPACE = UUID("5d0a3f0e-6f7e-5b7a-9c58-0e0f4b1d7c16")

OWN = "urn:derm-cds"
TERMS = "http://terminology.hl7.org/CodeSystem"
SNOMED, LOINC = "http://snomed.info/sct", "http://loinc.org"


def coding(system: str, code: str, display: str = "") -> dict[str, str]:
    """Make a Coding."""
    return {"system": system, "code": code, **({"display": display} if display else {})}


def concept(*codings: Mapping[str, str], text: str = "") -> dict[str, Any]:
    """Make a CodeableConcept; several codings say the same in several systems."""
    found: dict[str, Any] = {"coding": [dict(each) for each in codings]} if codings else {}
    return {**found, **({"text": text} if text else {})}


def hl7(system: str, code: str) -> dict[str, Any]:
    """Make a CodeableConcept of one of HL7's own code systems."""
    return concept(coding(f"{TERMS}/{system}", code))


def logical(kind: str, system: str, value: str) -> dict[str, Any]:
    """Refer to what another system keeps, by the identifier that it has there: no name, and nothing to follow."""
    return {"type": kind, "identifier": {"system": f"{OWN}:{system}", "value": value}}


def identifier(name: str, value: object) -> dict[str, str]:
    """An identifier that this service gave."""
    return {"system": f"{OWN}:{name}", "value": str(value)}


def clinician(subject: str) -> dict[str, Any]:
    """Refer to a clinician by the subject of their token."""
    return logical("Practitioner", "subject", subject)


def _id(kind: str, *of: object) -> str:
    return str(uuid5(_NAMESPACE, "/".join((kind, *map(str, of)))))


def to(kind: str, *of: object) -> dict[str, str]:
    """Refer to a resource of the same Bundle."""
    return {"reference": f"urn:uuid:{_id(kind, *of)}"}


def resource(kind: str, *of: object, **elements: Any) -> Resource:  # noqa: ANN401
    """Make a resource whose id follows from what it is of; FHIR has no null and nothing empty."""
    return {"resourceType": kind, "id": _id(kind, *of)} | {
        name: value for name, value in elements.items() if value not in (None, "", [], {})
    }


class Fact(StrEnum):
    """The three that are never mixed: every level and urgency of a report says which of them it is."""

    DEMAND = "demand"
    OPEN_DEMAND = "open-demand"
    DECISION = "decision"


#: What each of them means, for whoever reads it in an EHR.
FACTS: Mapping[Fact, str] = MappingProxyType(
    {
        Fact.DEMAND: "Demand: what the service's rules ask for this one image. Nothing that comes later changes it.",
        Fact.OPEN_DEMAND: "Open demand: the highest demand of this lesion that no clinician has answered yet.",
        Fact.DECISION: "Decision: a clinician's answer to the demand. It changes nothing of the service's answer.",
    }
)


@dataclass(frozen=True, slots=True)
class Code:
    """A verified code; `display` is empty where only the code was verified, not the words."""

    system: str
    code: str
    display: str
    source: str

    @property
    def coding(self) -> dict[str, str]:
        """As a Coding."""
        return coding(self.system, self.code, self.display)


_PYDICOM = "pydicom 3.0.2, DICOM PS3.16"
_ISIC_TEST = "public test of ISIC codes, resolved on tx.fhir.org 2026-09-10"

DERMATOSCOPY = Code(SNOMED, "1237125003", "Dermatoscopy of skin", "HL7 Switzerland, CH LAB-Order example")
PHOTOGRAPHY = Code(SNOMED, "446078004", "Dermoscopic photography", _PYDICOM)
SKIN_LESION = Code(SNOMED, "95324001", "Skin lesion", _PYDICOM)
PATHOLOGY = Code(LOINC, "11526-1", "Pathology study", "HL7 Switzerland, CH LAB-Order ServiceRequest")

#: Of a diagnosis that is as wide as the code. A class is a set: of BKL, DF, VASC and UNK no verified code is as wide,
#: and a narrower one would say more than was found.
DIAGNOSES: Mapping[Diagnosis, Code] = MappingProxyType(
    {
        Diagnosis.MEL: Code(SNOMED, "93655004", "", _ISIC_TEST),
        Diagnosis.NV: Code(SNOMED, "400010006", "", _ISIC_TEST),
        Diagnosis.BCC: Code(SNOMED, "254701007", "", _ISIC_TEST),
        Diagnosis.AK: Code(SNOMED, "201101007", "Actinic keratosis", _PYDICOM),
        Diagnosis.SCC: Code(SNOMED, "254651007", "Squamous cell carcinoma of skin", _PYDICOM),
    }
)

_TRUNK = Code(SNOMED, "86381001", "Skin structure of trunk", "NZHTS value set canshare-skin-trunk-topography")
#: The archive's other sites are unions of what SNOMED has codes for (head/neck), or not verified (palms/soles): text.
SITES: Mapping[AnatomSite, Code] = MappingProxyType(
    {
        AnatomSite.UPPER_EXTREMITY: Code(SNOMED, "371311000", "Skin structure of upper limb", _PYDICOM),
        AnatomSite.LOWER_EXTREMITY: Code(SNOMED, "371304004", "Skin structure of lower limb", _PYDICOM),
        AnatomSite.ANTERIOR_TORSO: Code(SNOMED, "181491009", "Skin structure of anterior trunk", _PYDICOM),
        AnatomSite.POSTERIOR_TORSO: Code(SNOMED, "66643007", "Skin structure of back", _PYDICOM),
        AnatomSite.LATERAL_TORSO: _TRUNK,  # broader; the text says which part
        AnatomSite.TORSO: _TRUNK,
    }
)
CODES: tuple[Code, ...] = (
    *(DERMATOSCOPY, PHOTOGRAPHY, SKIN_LESION, PATHOLOGY),
    *DIAGNOSES.values(),
    *SITES.values(),
)

#: HL7's words for a level, beside our own.
RISKS: Mapping[RiskLevel, str] = MappingProxyType(
    {RiskLevel.LOW: "low", RiskLevel.MEDIUM: "moderate", RiskLevel.HIGH: "high"}
)
#: FHIR's request-priority, in the same order; `stat` is for what cannot wait at all.
PRIORITIES: Mapping[Urgency, str] = MappingProxyType(
    {Urgency.ROUTINE: "routine", Urgency.EXPEDITED: "urgent", Urgency.URGENT: "asap"}
)


def diagnosis_concept(diagnosis: Diagnosis) -> dict[str, Any]:
    """Our class, and the SNOMED CT code that is as wide, where one is verified."""
    own = coding(f"{OWN}:diagnosis", diagnosis.value, diagnosis.display_name)
    verified = DIAGNOSES.get(diagnosis)
    return concept(own, *([verified.coding] if verified else []), text=diagnosis.display_name)


def site_concept(site: AnatomSite) -> dict[str, Any]:
    """The archive's word for the site, with the SNOMED CT code of what holds it, where one is verified."""
    verified = SITES.get(site)
    return concept(*([verified.coding] if verified else []), text=site.value)


def level_concept(level: RiskLevel) -> dict[str, Any]:
    """A level in our word and in HL7's."""
    return concept(
        coding(f"{OWN}:risk-level", level.value),
        coding(f"{TERMS}/risk-probability", RISKS[level]),
        text=level.value,
    )


#: By HTTP status; every other is `processing`.
_ISSUES: Mapping[int, str] = MappingProxyType(
    {
        401: "login",
        403: "forbidden",
        404: "not-found",
        405: "not-supported",
        409: "conflict",
        410: "deleted",
        422: "invalid",
        429: "throttled",
        500: "exception",
        503: "transient",
    }
)


def operation_outcome(problem: Mapping[str, Any]) -> Resource:
    """Say a problem document's words to a caller who understands only FHIR."""
    issue = {
        "severity": "error",
        "code": _ISSUES.get(problem["status"], "processing"),
        "details": concept(coding(f"{OWN}:problem", problem["code"]), text=problem["detail"]),
        "diagnostics": f"request {problem['request_id']}",
    }
    return {"resourceType": "OperationOutcome", "issue": [issue]}

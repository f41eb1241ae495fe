"""Assessments and clinical contexts as JSON, the way the record keeps them.

Lossless but for the embedding, which has a table of its own. JSON numbers lose whether they
were whole, so that the fields' types say which are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

from serve_app.domain.assessment import (
    Assessment,
    Change,
    Classification,
    Factor,
    Neighbours,
    Outcome,
    Provenance,
    Quality,
    Reason,
    Risk,
    RiskLevel,
    SimilarCase,
    Urgency,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.patient import (
    AnatomSite,
    Checklist,
    ClinicalContext,
    Discrepancy,
    History,
    Lookup,
    RecordCheck,
    Sex,
)

#: Raised when the form changes; older versions stay readable.
VERSION = 1

_T = TypeVar("_T")


def assessment_to_json(assessment: Assessment) -> dict[str, Any]:
    """Write an assessment, without its embedding, as JSON-able values."""
    neighbours = assessment.neighbours
    return {
        "version": VERSION,
        "outcome": assessment.outcome,
        "reasons": [_flat(reason) for reason in assessment.reasons],
        "quality": _flat(assessment.quality),
        "classification": assessment.classification
        and {
            **_flat(assessment.classification),
            "probabilities": dict(assessment.classification.probabilities),
        },
        "risk": assessment.risk
        and {**_flat(assessment.risk), "factors": [_flat(factor) for factor in assessment.risk.factors]},
        "neighbours": neighbours
        and {
            "similar": [_flat(case) for case in neighbours.similar],
            "malignant_share": neighbours.malignant_share,
            "nearest_benign": _flat(neighbours.nearest_benign),
            "nearest_malignant": _flat(neighbours.nearest_malignant),
        },
        "similar": [_flat(case) for case in assessment.similar],
        "change": _flat(assessment.change),
        "provenance": _flat(assessment.provenance),
        "timings_ms": dict(assessment.timings_ms),
    }


def assessment_from_json(answer: Mapping[str, Any]) -> Assessment:
    """Read an assessment back; its embedding is None. ValueError for a version this code does not know."""
    if answer["version"] != VERSION:
        raise ValueError(f"Assessments of version {answer['version']} are not known here")
    neighbours = answer["neighbours"] and _neighbours(answer["neighbours"])
    # Records from before the two were apart weighed what they showed, and have no such key.
    similar = answer.get("similar", answer["neighbours"]["similar"] if neighbours else ())
    return Assessment(
        outcome=Outcome(answer["outcome"]),
        reasons=tuple(Reason(**reason) for reason in answer["reasons"]),
        quality=_read(Quality, answer["quality"]),
        classification=answer["classification"] and _classification(answer["classification"]),
        risk=answer["risk"] and _risk(answer["risk"]),
        neighbours=neighbours,
        similar=tuple(_case(case) for case in similar),
        change=answer["change"] and _read(Change, answer["change"]),
        provenance=Provenance(**answer["provenance"]),
        embedding=None,
        timings_ms={stage: float(milliseconds) for stage, milliseconds in answer["timings_ms"].items()},
    )


def context_to_json(context: ClinicalContext) -> dict[str, Any]:
    """Write a clinical context as JSON-able values."""
    record = context.record
    return {
        **_flat(context),
        "history": _flat(context.history),
        "checklist": _flat(context.checklist),
        "record": record
        and {**_flat(record), "discrepancies": [_flat(found) for found in record.discrepancies]},
    }


def context_from_json(context: Mapping[str, Any]) -> ClinicalContext:
    """Read a clinical context back."""
    site, sex, checklist = context["anatom_site_general"], context["sex"], context["checklist"]
    return ClinicalContext(
        anatom_site_general=None if site is None else AnatomSite(site),
        age_approx=context["age_approx"],
        sex=None if sex is None else Sex(sex),
        history=History(**context["history"]),
        checklist=None if checklist is None else Checklist(**checklist),
        # Contexts from before there was a directory of patients have no such key.
        record=_record(context.get("record")),
    )


def _record(value: Mapping[str, Any] | None) -> RecordCheck | None:
    if value is None:
        return None
    return RecordCheck(
        patient=Lookup(value["patient"]),
        encounter=None if value["encounter"] is None else Lookup(value["encounter"]),
        discrepancies=tuple(Discrepancy(**found) for found in value["discrepancies"]),
    )


def probabilities_from_json(probabilities: Mapping[str, float]) -> dict[Diagnosis, float]:
    """Read the probabilities of a classification, in the order of the diagnoses."""
    return {
        diagnosis: float(probabilities[diagnosis]) for diagnosis in Diagnosis if diagnosis in probabilities
    }


def _classification(value: Mapping[str, Any]) -> Classification:
    return _read(
        Classification,
        {
            **value,
            "probabilities": probabilities_from_json(value["probabilities"]),
            "prediction_set": tuple(Diagnosis(diagnosis) for diagnosis in value["prediction_set"]),
        },
    )


def _risk(value: Mapping[str, Any]) -> Risk:
    return _read(
        Risk,
        {
            **value,
            "level": RiskLevel(value["level"]),
            "urgency": Urgency(value["urgency"]),
            "factors": tuple(Factor(**factor) for factor in value["factors"]),
        },
    )


def _neighbours(value: Mapping[str, Any]) -> Neighbours:
    return _read(
        Neighbours,
        {
            "similar": tuple(_case(case) for case in value["similar"]),
            "malignant_share": value["malignant_share"],
            "nearest_benign": value["nearest_benign"] and _case(value["nearest_benign"]),
            "nearest_malignant": value["nearest_malignant"] and _case(value["nearest_malignant"]),
        },
    )


def _case(value: Mapping[str, Any]) -> SimilarCase:
    return _read(SimilarCase, {**value, "diagnosis": Diagnosis(value["diagnosis"])})


def _flat(value: Any) -> Any:  # noqa: ANN401
    """Write a dataclass's own fields, and leave what they hold as it is."""
    return None if value is None else {name: getattr(value, name) for name in _fields(type(value))}  # type: ignore[arg-type]


def _read(kind: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a dataclass; whole numbers become floats where the field says so."""
    given = dict(values)
    for name in _floats(kind):  # type: ignore[arg-type]
        if given[name] is not None:
            given[name] = float(given[name])
    return kind(**given)


@cache
def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


@cache
def _floats(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind) if field.type in {"float", "float | None"})

"""The PMS's JSON of a patient and of an encounter (docs/pms.md), read with as little trust as an upload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from typing import Any

from serve_app.domain.patient import History, PatientRecord, Sex

#: Years; an age beyond is a wrong date.
MAX_AGE = 120


def read_patient(patient_id: str, body: Mapping[str, Any], *, today: date) -> PatientRecord:
    """Read `{"patient_id", "birth_date", "sex", "history"}`; of the date of birth only the age is kept.

    Raises ValueError, without quoting the body, for another patient's record or one that is none.
    """
    if body.get("patient_id") != patient_id:
        raise ValueError("not this patient's record")
    history = {} if body.get("history") is None else body["history"]
    if not isinstance(history, dict):
        raise ValueError("history is not an object")  # noqa: TRY004
    answers = {item.name: history.get(item.name) for item in fields(History)}
    if not all(answer is None or isinstance(answer, bool) for answer in answers.values()):
        raise ValueError("an answer of the history is not yes, no or null")
    return PatientRecord(_age(body.get("birth_date"), today), _sex(body.get("sex")), History(**answers))


def read_encounter(encounter_id: str, body: Mapping[str, Any]) -> str:
    """Read whose an encounter is from `{"encounter_id", "patient_id"}`; ValueError as above."""
    patient_id = body.get("patient_id")
    if body.get("encounter_id") != encounter_id or not isinstance(patient_id, str) or not patient_id:
        raise ValueError("not this encounter")
    return patient_id


def _age(birth_date: object, today: date) -> int | None:
    if birth_date is None:
        return None
    if not isinstance(birth_date, str):
        raise ValueError("birth_date is not a date")  # noqa: TRY004
    try:
        born = date.fromisoformat(birth_date)
    except ValueError:
        raise ValueError("birth_date is not a date") from None
    age = today.year - born.year - ((today.month, today.day) < (born.month, born.day))
    if not 0 <= age <= MAX_AGE:
        raise ValueError("birth_date is not a living person's")
    return age


def _sex(sex: object) -> Sex | None:
    if sex is None:
        return None
    if not isinstance(sex, str) or sex not in set(Sex):
        raise ValueError("sex is not one of FHIR's")
    return Sex(sex)

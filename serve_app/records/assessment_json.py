"""Assessments and clinical contexts as JSON, the way the record keeps them: one adapter over each domain type.

Lossless but for the embedding, which has a table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from serve_app.domain.assessment import Assessment
from serve_app.domain.patient import ClinicalContext

#: Raised when the form changes; older versions stay readable.
VERSION = 1

_ASSESSMENT = TypeAdapter(Assessment)
_CONTEXT = TypeAdapter(ClinicalContext)
#: Records from before these were measured have no such keys.
_MEASURED_LATER = {"colour": None, "two_levels": None, "damaged": None}
#: Left out where they were not stated, so that a context is written as before, and a replica of before reads it.
_STATED_LATER = frozenset({"skin_type", "device", "position"})


def assessment_to_json(assessment: Assessment) -> dict[str, Any]:
    """Write an assessment, without its embedding, as JSON-able values."""
    written: dict[str, Any] = _ASSESSMENT.dump_python(
        assessment, mode="json", exclude={"embedding"}, exclude_computed_fields=True
    )
    return {"version": VERSION, **written}


def assessment_from_json(answer: Mapping[str, Any]) -> Assessment:
    """Read an assessment back; its embedding is None. ValueError for a version this code does not know."""
    if answer["version"] != VERSION:
        raise ValueError(f"Assessments of version {answer['version']} are not known here")
    # Records from before the two were apart weighed what they showed, and have no `similar`.
    shown = answer["neighbours"]["similar"] if answer["neighbours"] else ()
    quality = _MEASURED_LATER | answer["quality"]
    return _ASSESSMENT.validate_python({"similar": shown, **answer, "quality": quality, "embedding": None})


def answer_from_json(answer: Mapping[str, Any] | None) -> Assessment | None:
    """Read an assessment back where there is one."""
    return None if answer is None else assessment_from_json(answer)


def context_to_json(context: ClinicalContext) -> dict[str, Any]:
    """Write a clinical context as JSON-able values; without what later versions added, where it was not stated."""
    written: dict[str, Any] = _CONTEXT.dump_python(context, mode="json")
    return {name: value for name, value in written.items() if value is not None or name not in _STATED_LATER}

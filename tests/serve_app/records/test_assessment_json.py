"""What is kept is what was concluded, to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
import json
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
from pydantic import TypeAdapter
import pytest

from serve_app.domain.assessment import Assessment
from serve_app.domain.patient import Checklist, ClinicalContext, Lookup, RecordCheck
from serve_app.records.assessment_json import (
    assessment_from_json,
    assessment_to_json,
    context_to_json,
)


def _any(hint: object) -> st.SearchStrategy:
    """Anything a field of this type may hold; floats from 0 to 1, which every field takes."""
    arguments = get_args(hint)
    if hint is float:
        return st.floats(0, 1)
    if is_dataclass(hint):
        kinds = get_type_hints(hint)
        values = {each.name: _any(kinds[each.name]) for each in fields(hint) if each.name != "embedding"}
        return st.builds(hint, **values, **({"embedding": st.none()} if hint is Assessment else {}))
    if get_origin(hint) is UnionType:
        return st.one_of(*map(_any, arguments))
    if get_origin(hint) is tuple:
        return st.lists(_any(arguments[0]), max_size=3).map(tuple)
    if get_origin(hint) is Mapping:
        return st.dictionaries(*map(_any, arguments), max_size=9)
    return st.from_type(hint)


@settings(deadline=None, max_examples=25)
@given(_any(Assessment), _any(ClinicalContext))
def test_both_survive_json(assessment: Assessment, context: ClinicalContext) -> None:
    text = json.dumps([assessment_to_json(assessment), context_to_json(context)], allow_nan=False)
    answer, asked = json.loads(text)
    assert assessment_from_json(answer) == assessment
    assert TypeAdapter(ClinicalContext).validate_python(asked) == context


@pytest.mark.parametrize("place", [(), ("history",), ("checklist",), ("record",)])
def test_what_a_later_version_knows_of_the_patient_is_refused_and_not_left_out(
    place: tuple[str, ...],
) -> None:
    """A risk factor that this version cannot weigh must not vanish."""
    kept = context_to_json(ClinicalContext(checklist=Checklist(), record=RecordCheck(Lookup.FOUND)))
    table = kept
    for name in place:
        table = table[name]
    table["transplant"] = True
    with pytest.raises(ValueError, match="transplant"):
        TypeAdapter(ClinicalContext).validate_python(kept)


async def test_an_assessment_survives_jsonb_without_its_embedding(pool, assessment) -> None:
    timings = {"tiny": 5e-324, "large": 1.7e308, "third": 1 / 3, "whole": 1e22}
    value = assessment(embedding=np.ones(512, np.float32), timings_ms=timings)
    kept = await pool.fetchval("SELECT $1::jsonb", assessment_to_json(value))
    assert "embedding" not in kept
    back = assessment_from_json(kept)
    assert back == replace(value, embedding=None)
    assert all(isinstance(milliseconds, float) for milliseconds in back.timings_ms.values())
    assert isinstance(back.risk.score, float)
    assert isinstance(back.quality.width, int)
    with pytest.raises(ValueError, match="version 2"):
        assessment_from_json({**kept, "version": 2})

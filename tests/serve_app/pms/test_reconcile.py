"""Asking the directory raises a risk or leaves it: never less cautious than either side, every difference stated."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
import pytest

from serve_app.domain.patient import ClinicalContext, Discrepancy, History, Lookup, PatientRecord, Sex
from serve_app.pms.directory import reconcile
from serve_app.records.assessment_json import context_to_json

answers = st.none() | st.booleans()
histories = st.builds(History, answers, answers, answers, answers)
ages = st.none() | st.integers(0, 120)
sexes = st.none() | st.sampled_from(Sex)
contexts = st.builds(ClinicalContext, age_approx=ages, sex=sexes, history=histories)
records = st.builds(PatientRecord, ages, sexes, histories)


@settings(max_examples=50)
@given(contexts, records)
def test_nothing_of_either_side_is_lost_downwards(sent, record) -> None:
    joined = reconcile(sent, record)
    assert joined.age_approx == max((a for a in (sent.age_approx, record.age) if a is not None), default=None)
    for item in fields(History):
        both = {getattr(sent.history, item.name), getattr(record.history, item.name)}
        weighed = getattr(joined.history, item.name)
        assert (weighed is True) == (True in both)
        assert (weighed is None) == (both == {None})
    assert TypeAdapter(ClinicalContext).validate_python(context_to_json(joined)) == joined


@settings(max_examples=50)
@given(contexts, records)
def test_sides_that_agree_have_no_discrepancy(sent, record) -> None:
    agreed = reconcile(sent, PatientRecord(sent.age_approx, sent.sex, sent.history))
    assert agreed.record.discrepancies == ()
    assert (agreed.age_approx, agreed.history) == (sent.age_approx, sent.history)


@pytest.mark.parametrize(
    ("sent", "record", "found"),
    [
        (ClinicalContext(age_approx=60), PatientRecord(63), ()),
        (ClinicalContext(age_approx=60), PatientRecord(64), (Discrepancy("age_approx", "60", "64"),)),
        (ClinicalContext(sex=Sex.UNKNOWN), PatientRecord(sex=Sex.MALE), ()),
        (
            ClinicalContext(sex=Sex.FEMALE),
            PatientRecord(sex=Sex.MALE),
            (Discrepancy("sex", "female", "male"),),
        ),
        (
            ClinicalContext(history=History(immunosuppression=False)),
            PatientRecord(history=History(immunosuppression=True)),
            (Discrepancy("immunosuppression", "no", "yes"),),
        ),
    ],
)
def test_discrepancies_are_stated(sent, record, found) -> None:
    assert reconcile(sent, record).record.discrepancies == found


def test_a_patient_the_directory_does_not_know_changes_nothing_else() -> None:
    sent = ClinicalContext(age_approx=60, sex=Sex.MALE)
    joined = reconcile(sent, None, encounter=Lookup.NOT_AVAILABLE)
    assert (joined.age_approx, joined.sex, joined.record.patient) == (60, Sex.MALE, Lookup.UNKNOWN)


def test_contexts_from_before_there_was_a_directory_are_read() -> None:
    old = context_to_json(ClinicalContext(age_approx=60))
    del old["record"]
    assert TypeAdapter(ClinicalContext).validate_python(old) == ClinicalContext(age_approx=60)

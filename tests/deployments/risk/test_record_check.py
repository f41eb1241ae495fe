"""What the patient's record adds to a conclusion: words, a doubt about identity, and never a lower risk."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.domain.assessment import Outcome
from serve_app.domain.patient import Discrepancy, Lookup, RecordCheck
from tests.deployments.risk.conftest import NOTHING_OF_NOTE

AGE = Discrepancy("age_approx", "43", "61")
SEX = Discrepancy("sex", "female", "male")
HISTORY = Discrepancy("personal_melanoma", "no", "yes")


def codes(conclusion) -> set[str]:
    return {factor.code for factor in conclusion.risk.factors}


@pytest.mark.parametrize(
    ("check", "code"),
    [
        (RecordCheck(Lookup.NOT_AVAILABLE), "record_not_available"),
        (RecordCheck(Lookup.UNKNOWN), "record_not_found"),
        (RecordCheck(Lookup.FOUND, Lookup.NOT_AVAILABLE), "encounter_not_verified"),
        (RecordCheck(Lookup.FOUND, Lookup.FOUND, (HISTORY,)), "history_discrepancy"),
        (RecordCheck(Lookup.FOUND, Lookup.FOUND), None),
    ],
)
def test_what_the_record_could_not_add_is_a_neutral_factor(assess, check, code) -> None:
    plain = assess(context=NOTHING_OF_NOTE)
    stated = assess(context=replace(NOTHING_OF_NOTE, record=check))
    assert codes(stated) - codes(plain) == ({code} if code else set())
    assert stated.outcome is plain.outcome
    assert replace(stated.risk, factors=()) == replace(plain.risk, factors=())


@pytest.mark.parametrize(("found", "code"), [(AGE, "age_discrepancy"), (SEX, "sex_discrepancy")])
def test_another_age_or_sex_is_a_doubt_about_whose_image_it_is(assess, found, code) -> None:
    conclusion = assess(context=replace(NOTHING_OF_NOTE, record=RecordCheck(Lookup.FOUND, None, (found,))))
    assert conclusion.outcome is Outcome.REVIEW
    (reason,) = [reason for reason in conclusion.reasons if reason.code == "identity_discrepancy"]
    assert found.sent in reason.message
    assert found.recorded in reason.message
    assert code in codes(conclusion)

"""Each rule, at its threshold and just under it."""

from __future__ import annotations

import pytest

from serve_app.domain.assessment import Change, Outcome, RiskLevel, Urgency
from serve_app.domain.errors import ModelContractError, StageFailed
from serve_app.domain.patient import AnatomSite, Checklist, ClinicalContext

LOW = (RiskLevel.LOW, Urgency.ROUTINE)
MEDIUM = (RiskLevel.MEDIUM, Urgency.ROUTINE)
EXPEDITED = (RiskLevel.MEDIUM, Urgency.EXPEDITED)
URGENT = (RiskLevel.HIGH, Urgency.URGENT)
HARMED = {AnatomSite.HEAD_NECK, AnatomSite.ORAL_GENITAL}


def said(conclusion) -> tuple[RiskLevel, Urgency]:
    return conclusion.risk.level, conclusion.risk.urgency


def codes(conclusion) -> dict[str, str]:
    return {factor.code: factor.effect for factor in conclusion.risk.factors}


def test_a_plain_benign_case_is_decided_low_and_routine(assess):
    conclusion = assess()
    assert conclusion.outcome is Outcome.DECIDED
    assert conclusion.reasons == ()
    assert said(conclusion) == LOW
    assert conclusion.risk.score < 0.05
    assert conclusion.policy_version == conclusion.risk.policy_version == "2026-11.4"
    quality = conclusion.quality
    assert (quality.width, quality.height, quality.acceptable) == (1200, 900, True)


@pytest.mark.parametrize(
    ("probabilities", "expected", "code"),
    [
        ({"MEL": 0.08}, URGENT, "melanoma"),
        ({"MEL": 0.0799}, EXPEDITED, "melanoma_plausible"),
        ({"MEL": 0.04}, EXPEDITED, "melanoma_plausible"),
        ({"MEL": 0.0399}, LOW, "melanoma"),
        ({"MEL": 0.039, "members": "NV MEL"}, EXPEDITED, "melanoma_plausible"),
        ({"SCC": 0.20}, URGENT, "scc"),
        ({"SCC": 0.19}, LOW, "melanoma"),
        ({"SCC": 0.17, "MEL": 0.03}, URGENT, "scc"),
        ({"BCC": 0.30}, MEDIUM, "bcc"),
        ({"BCC": 0.19}, LOW, "melanoma"),
        ({"BCC": 0.15, "SCC": 0.15}, MEDIUM, "bcc"),
        ({"AK": 0.40}, MEDIUM, "ak"),
        ({"AK": 0.19}, LOW, "melanoma"),
        ({"AK": 0.30, "BCC": 0.10}, MEDIUM, "ak"),
        ({"BCC": 0.29}, MEDIUM, "not_benign"),
        ({"AK": 0.39}, MEDIUM, "not_benign"),
        ({"UNK": 0.20}, MEDIUM, "not_benign"),
        ({"UNK": 0.18}, LOW, "melanoma"),
        ({"UNK": 0.14, "AK": 0.06}, MEDIUM, "not_benign"),
        # Half of the mass is unknown, so the nine say 4.5 %; the model's own eight say 9 %.
        ({"MEL": 0.045, "UNK": 0.5}, URGENT, "melanoma"),
    ],
)
def test_probabilities(assess, classification, probabilities, expected, code):
    conclusion = assess(classification=classification(**probabilities))
    assert said(conclusion) == expected
    assert code in codes(conclusion)


@pytest.mark.parametrize(
    ("diagnosis", "changes", "expected"),
    [
        *(
            ("BCC", {"anatom_site_general": site}, EXPEDITED if site in HARMED else MEDIUM)
            for site in AnatomSite
        ),
        *(("AK", {"immunosuppression": told}, EXPEDITED if told else MEDIUM) for told in (True, False, None)),
    ],
)
def test_expedited_where_delay_does_harm(assess, classification, context, diagnosis, changes, expected):
    given = classification(**{diagnosis: 0.5})
    assert said(assess(classification=given, context=context(**changes))) == expected


@pytest.mark.parametrize(
    ("checklist", "expected"),
    [
        (Checklist(), LOW),
        (Checklist(change_in_size=True), LOW),
        (Checklist(oozing=True, inflammation=True), LOW),
        (Checklist(change_in_size=True, oozing=True), URGENT),
        (Checklist(oozing=True, inflammation=True, diameter_7mm_or_more=True), URGENT),
        (Checklist(irregular_shape=True, irregular_colour=True), URGENT),
    ],
)
@pytest.mark.parametrize("nevus", [0.9, 0.999999])
def test_the_checklist_alone_demands_referral_whatever_the_model_says(
    assess, classification, context, checklist, expected, nevus
):
    conclusion = assess(classification=classification(BKL=1 - nevus), context=context(checklist=checklist))
    assert said(conclusion) == expected
    if expected == URGENT:
        assert codes(conclusion)["checklist"] == "demands"
        assert conclusion.risk.factors[0].code == "checklist"
        assert conclusion.risk.score >= 0.6


@pytest.mark.parametrize(
    ("share", "benign", "malignant", "expected", "effect", "leads"),
    [
        (0.0, 0.8, 0.7, LOW, "none", False),
        (0.4, 0.8, 0.7, LOW, "raises", False),
        (0.5, 0.8, 0.7, EXPEDITED, "demands", False),
        (1.0, 0.8, 0.7, EXPEDITED, "demands", False),
        (0.1, 0.8, 0.86, LOW, "raises", True),
        (0.1, 0.8, 0.84, LOW, "raises", False),
        (0.1, None, 0.2, LOW, "raises", True),
        (None, None, None, LOW, None, False),
    ],
)
def test_malignant_neighbours(assess, neighbours, share, benign, malignant, expected, effect, leads):
    conclusion = assess(neighbours=neighbours(share, benign=benign, malignant=malignant))
    assert said(conclusion) == expected
    assert codes(conclusion).get("neighbours") == effect
    assert ("neighbours_not_available" in codes(conclusion)) is (effect is None)
    assert ("nearest_malignant" in codes(conclusion)) is leads


@pytest.mark.parametrize(
    ("similarity", "delta", "expected", "code"),
    [
        (0.9, 0.10, EXPEDITED, "melanoma_rise"),
        (0.9, 0.09, LOW, None),
        (0.9, -0.5, LOW, None),
        (0.59, 0.0, LOW, "appearance_change"),
        (0.60, 0.0, LOW, None),
        (None, None, LOW, None),
    ],
)
def test_change_since_the_last_image(assess, similarity, delta, expected, code):
    change = Change("2026-05-01T09:00:00Z", "00000000-0000-7000-8000-000000000000", similarity, delta)
    conclusion = assess(change=change)
    assert said(conclusion) == expected
    assert {"melanoma_rise", "appearance_change"} & set(codes(conclusion)) == ({code} if code else set())


@pytest.mark.parametrize(
    ("changes", "code", "raises"),
    [
        ({"age_approx": 60}, "age", 0.10),
        ({"anatom_site_general": AnatomSite.HEAD_NECK}, "head_neck", 0.05),
        ({"personal_melanoma": True}, "personal_melanoma", 0.20),
        ({"personal_skin_cancer": True}, "personal_skin_cancer", 0.10),
        ({"family_melanoma": True}, "family_melanoma", 0.10),
        ({"immunosuppression": True}, "immunosuppression", 0.10),
        ({"checklist": Checklist(change_in_size=True)}, "checklist", 1 - 0.95**2),
    ],
)
def test_each_risk_factor_raises_the_score(assess, context, changes, code, raises):
    plain = assess(context=context(anatom_site_general=AnatomSite.TORSO)).risk
    more = assess(context=context(**changes)).risk
    assert {f.code: f.effect for f in more.factors}[code] == "raises"
    assert 1 - more.score == pytest.approx((1 - plain.score) * (1 - raises), abs=2e-4)


def test_risk_factors_add_up_and_what_is_not_stated_of_a_history_is_named(assess, context):
    many = {"age_approx": 75, "personal_melanoma": True, "family_melanoma": True}
    conclusion = assess(context=context(**many, immunosuppression=True))
    assert said(conclusion) == MEDIUM
    assert "age" not in codes(assess(context=context(age_approx=59)))
    partly = assess(context=context(**many, immunosuppression=None))
    incomplete = next(f for f in partly.risk.factors if f.code == "history_incomplete")
    assert incomplete.message == "History was not available on: immunosuppression."


def test_what_was_not_stated_is_named_and_counts_for_nothing(assess):
    conclusion = assess(context=ClinicalContext())
    missing = {code for code, effect in codes(conclusion).items() if effect == "not_available"}
    assert missing == {
        "age_not_available", "site_not_available", "history_not_available", "checklist_not_available",
    }  # fmt: skip
    assert conclusion.risk.score == assess().risk.score


def test_factors_come_strongest_first(assess, classification, neighbours):
    conclusion = assess(
        classification=classification(MEL=0.5), neighbours=neighbours(0.9), context=ClinicalContext()
    )
    order = ["demands", "raises", "none", "not_available"]
    places = [order.index(factor.effect) for factor in conclusion.risk.factors]
    assert places == sorted(places)


def test_the_score_says_what_the_level_says(assess, classification):
    for mel in (0.0, 0.03, 0.05, 0.08, 0.3, 0.9):
        risk = assess(classification=classification(MEL=mel, members="NV BKL")).risk
        band = "high" if risk.score >= 0.6 else "medium" if risk.score >= 0.3 else "low"
        assert risk.level == band


def test_a_model_without_the_operating_point_is_refused(assess):
    with pytest.raises(ModelContractError, match="'melanoma'; the model has malignant"):
        assess(operating_points={"malignant": 0.1})


@pytest.mark.parametrize(
    "broken", [{"MEL": float("nan")}, {"MEL": -0.1}, {"MEL": float("inf")}, {"MEL": 2.0}]
)
def test_nothing_is_concluded_from_what_is_no_distribution(assess, classification, broken):
    with pytest.raises(StageFailed):
        assess(classification=classification(**broken))

"""When there is no answer, and when a clinician must look: each with its cause and what to do."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from deployments.preprocess.decode import UploadLimits
from deployments.preprocess.pixels import InputGeometry
from deployments.preprocess.preprocess import prepare_image
from deployments.risk.doubts import judge_quality
from deployments.risk.policy import read_policy
from serve_app.domain.assessment import Change, Outcome, QualityMeasures, RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite, Checklist, Discrepancy, Lookup, RecordCheck
from tests.deployments.risk.conftest import GOOD, NOTHING_OF_NOTE

AGE = Discrepancy("age_approx", "43", "61")
SEX = Discrepancy("sex", "female", "male")
HISTORY = Discrepancy("personal_melanoma", "no", "yes")


def codes(conclusion) -> list[str]:
    return [reason.code for reason in conclusion.reasons]


def factors(conclusion) -> set[str]:
    return {factor.code for factor in conclusion.risk.factors}


@pytest.mark.parametrize(
    ("measure", "hard", "soft", "fine", "code"),
    [
        ("sharpness", 4.4, 4.5, 9.0, "blurred"),
        ("exposure", 0.079, 0.08, 0.20, "underexposed"),
        ("exposure", 0.951, 0.95, 0.90, "overexposed"),
        ("contrast", 0.0119, 0.012, 0.020, "low_contrast"),
        ("dark", 0.701, 0.70, 0.35, "dark_area"),
        ("bright", 0.801, 0.80, 0.45, "glare"),
    ],
)
def test_quality(assess, measure, hard, soft, fine, code):
    refused = assess(quality=replace(GOOD, **{measure: hard}))
    assert (refused.outcome, codes(refused), refused.risk) == (Outcome.REFUSED, [code], None)
    assert not refused.quality.acceptable
    review = assess(quality=replace(GOOD, **{measure: soft}))
    assert (review.outcome, codes(review)) == (Outcome.REVIEW, [f"limited_{code}"])
    assert review.risk is not None
    assert review.quality.acceptable
    assert assess(quality=replace(GOOD, **{measure: fine})).outcome is Outcome.DECIDED


@pytest.mark.parametrize(
    ("measure", "beyond", "fine", "outcome", "code"),
    [
        ("colour", 2.39, 2.4, Outcome.REVIEW, "no_colour"),
        ("damaged", 0.001, 0.0, Outcome.REVIEW, "damaged_image"),
        ("two_levels", 0.981, 0.98, Outcome.REFUSED, "two_levels"),
        ("sharpness", float("nan"), 9.0, Outcome.REFUSED, "blurred"),
    ],
)
def test_what_is_only_ever_reviewed_or_refused(assess, measure, beyond, fine, outcome, code):
    found = assess(quality=replace(GOOD, **{measure: beyond}))
    assert (found.outcome, codes(found)) == (outcome, [code])
    assert all(reason.action.endswith(".") for reason in found.reasons)
    assert (found.risk is None) == (outcome is Outcome.REFUSED)
    assert assess(quality=replace(GOOD, **{measure: fine})).outcome is Outcome.DECIDED


def test_files_without_colour_that_were_answered(failing_dir, policy):
    grey, one_bit = (
        judge_quality(
            prepare_image((failing_dir / name).read_bytes(), InputGeometry(176), UploadLimits()).quality,
            policy.quality,
        )
        for name in ("pub-04-melanoma-greyscale.jpg", "pub-12-one-bit.png")
    )
    assert grey.acceptable
    assert "no_colour" in [reason.code for reason in grey.concerns]
    assert "two_levels" in [reason.code for reason in one_bit.refusals]


@pytest.mark.parametrize("version", ["2026-11.2", "2026-11.3"])
def test_an_older_policy_asks_nothing_of_what_was_measured_later(version):
    quality = replace(GOOD, colour=0.0, two_levels=1.0, damaged=0.04)
    verdict = judge_quality(quality, read_policy(version).quality)
    assert verdict.acceptable
    assert not verdict.concerns


def test_a_black_image_is_refused_for_all_that_is_wrong_with_it(assess):
    conclusion = assess(quality=QualityMeasures(0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0))
    assert codes(conclusion) == ["blurred", "underexposed", "low_contrast", "dark_area", "two_levels"]


def test_clearly_not_dermoscopy_is_refused(assess, classification):
    refused = assess(classification=classification(UNK=0.95))
    assert (refused.outcome, codes(refused), refused.risk) == (Outcome.REFUSED, ["not_dermoscopic"], None)
    assert assess(classification=classification(UNK=0.94)).outcome is Outcome.REVIEW


@pytest.mark.parametrize("why", ["quality", "unknown"])
def test_a_refused_image_does_not_silence_the_checklist(assess, classification, context, why):
    four = Checklist(irregular_shape=True, irregular_colour=True)
    changes = (
        {"quality": replace(GOOD, sharpness=1.0)}
        if why == "quality"
        else {"classification": classification(UNK=1.0)}
    )
    conclusion = assess(**changes, context=context(checklist=four))
    assert conclusion.outcome is Outcome.REFUSED
    assert codes(conclusion)[-1] == "checklist_demands_referral"
    assert "suspected-cancer pathway" in conclusion.reasons[-1].action
    assert "checklist_demands_referral" not in codes(assess(**changes))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"UNK": 0.20}, ["out_of_distribution"]),
        ({"UNK": 0.19}, []),
        ({"members": ""}, ["empty_prediction_set"]),
        ({"members": "NV BKL DF"}, []),
        ({"members": "NV BKL DF VASC"}, ["wide_prediction_set"]),
        ({"BKL": 0.455}, ["low_margin"]),
        ({"BKL": 0.44}, []),
        ({"BKL": 0.37, "UNK": 0.19}, ["low_margin"]),
        ({"MEL": 0.2, "members": "NV MEL"}, []),
    ],
)
def test_the_models_doubts(assess, classification, given, expected):
    conclusion = assess(classification=classification(**given))
    assert codes(conclusion) == expected
    assert conclusion.outcome is (Outcome.REVIEW if expected else Outcome.DECIDED)


@pytest.mark.parametrize(
    ("mel", "share", "disagree"),
    [(0.05, 0.69, False), (0.05, 0.70, True), (0.9, 0.10, True), (0.9, 0.11, False), (0.9, None, False)],
)
def test_neighbours_that_disagree(assess, classification, neighbours, mel, share, disagree):
    conclusion = assess(classification=classification(MEL=mel), neighbours=neighbours(share))
    assert codes(conclusion) == (["neighbours_disagree"] if disagree else [])


@pytest.mark.parametrize(
    ("similarity", "level", "expected"),
    [
        (0.25, None, []),
        (0.24, None, ["perhaps_another_lesion"]),
        (-0.06, RiskLevel.LOW, ["perhaps_another_lesion"]),
        (0.39, RiskLevel.LOW, []),
        (0.39, RiskLevel.MEDIUM, ["perhaps_another_lesion"]),
        (0.40, RiskLevel.HIGH, []),
        (None, None, ["identity_not_checked"]),
    ],
)
def test_whether_a_follow_up_shows_the_same_lesion(assess, similarity, level, expected):
    change = Change("2026-05-01", "x", similarity, 0.0)
    conclusion = assess(change=change, compared_level=level)
    assert codes(conclusion) == expected
    assert conclusion.outcome is (Outcome.REVIEW if expected else Outcome.DECIDED)
    assert conclusion.risk == assess(change=change).risk
    # What was not asked before is not asked of an earlier policy.
    assert read_policy("2026-11.3").review.same_lesion_if_lower == 0.0
    off = {"review": {"same_lesion": 0.0, "same_lesion_if_lower": 0.0}}
    assert codes(assess(change=change, compared_level=level, overrides=off)) == []


@pytest.mark.parametrize("site", AnatomSite)
def test_sites_the_model_has_hardly_seen(assess, context, site):
    conclusion = assess(context=context(anatom_site_general=site))
    unfamiliar = site in {AnatomSite.PALMS_SOLES, AnatomSite.ORAL_GENITAL}
    assert codes(conclusion) == (["unfamiliar_site"] if unfamiliar else [])


def test_melanoma_in_a_benign_set_is_reviewed_where_the_policy_asks(assess, classification, neighbours):
    given = classification(MEL=0.2, members="NV MEL")
    on = {"review": {"melanoma_in_set": True}}
    assert codes(assess(classification=given, overrides=on)) == ["melanoma_not_excluded"]
    first = classification(MEL=0.6, members="NV MEL")
    assert codes(assess(classification=first, neighbours=neighbours(0.5), overrides=on)) == []


@pytest.mark.parametrize("doubt", [{"BKL": 0.45}, {"members": "NV MEL BKL DF"}, {"UNK": 0.6}])
def test_uncertain_and_melanoma_plausible_is_never_low(assess, classification, doubt):
    conclusion = assess(classification=classification(MEL=0.05, **doubt))
    assert conclusion.outcome is Outcome.REVIEW
    assert conclusion.risk.level is not RiskLevel.LOW
    assert conclusion.risk.urgency is not Urgency.ROUTINE


def test_fold_0_is_hardly_ever_refused(isic_dir, policy):
    """The issue allows 1 %; a twentieth of fold 0 here, all of it in the evaluation of a model."""
    with (isic_dir / "train.csv").open(newline="", encoding="utf-8") as file:
        ids = [row["isic_id"] for row in csv.DictReader(file) if row["fold"] == "0"][::20]
    geometry, limits = InputGeometry(policy.quality.input_side), UploadLimits(min_side=128)
    verdicts = [
        judge_quality(
            prepare_image((isic_dir / "images" / f"{i}.jpg").read_bytes(), geometry, limits).quality,
            policy.quality,
        )
        for i in ids
    ]
    assert len(verdicts) > 100
    assert sum(not v.acceptable for v in verdicts) <= 0.01 * len(verdicts)
    assert sum(bool(v.concerns) for v in verdicts) <= 0.03 * len(verdicts)


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
    assert factors(stated) - factors(plain) == ({code} if code else set())
    assert stated.outcome is plain.outcome
    assert replace(stated.risk, factors=()) == replace(plain.risk, factors=())


@pytest.mark.parametrize(("found", "code"), [(AGE, "age_discrepancy"), (SEX, "sex_discrepancy")])
def test_another_age_or_sex_is_a_doubt_about_whose_image_it_is(assess, found, code) -> None:
    conclusion = assess(context=replace(NOTHING_OF_NOTE, record=RecordCheck(Lookup.FOUND, None, (found,))))
    assert conclusion.outcome is Outcome.REVIEW
    (reason,) = [reason for reason in conclusion.reasons if reason.code == "identity_discrepancy"]
    assert found.sent in reason.message
    assert found.recorded in reason.message
    assert code in factors(conclusion)

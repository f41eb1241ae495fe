"""The statistics of a promotion, against values worked out by hand or known from elsewhere."""

from __future__ import annotations

from dataclasses import replace
import json
from pathlib import Path

import numpy as np
import pytest

from data_jobs.promotion.acceptance import judge, parse_acceptance, report_json, report_text
from data_jobs.promotion.comparison import (
    CaseView,
    ChangedCase,
    Comparison,
    Figures,
    PairedCounts,
    Subgroup,
    compare_pairs,
)
from data_jobs.training.recipe import AcceptancePlan, read_recipe
from serve_app.domain.errors import DermError
from tests.model_folders import RECIPES

NAN = float("nan")


@pytest.mark.parametrize(
    ("lost", "gained", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 6, 2 / 64), (6, 0, 2 / 64), (2, 10, 2 * 79 / 4096), (5, 5, 1.0)],
)
def test_mcnemar_is_exact_and_two_sided(lost: int, gained: int, p_value: float) -> None:
    live = np.array([True] * lost + [False] * gained + [True] * 7 + [False] * 3)
    candidate = np.array([False] * lost + [True] * gained + [True] * 7 + [False] * 3)
    found = compare_pairs(live, candidate)
    assert (found.cases, found.lost, found.gained) == (lost + gained + 10, lost, gained)
    assert found.p_value == pytest.approx(p_value, abs=1e-12)


FIGURES = Figures(
    images=100,
    top1=0.8,
    top3=0.95,
    balanced_accuracy=0.6,
    melanoma_auc=0.9,
    ece=0.02,
    melanoma_lesions=20,
    melanoma_misses=1,
    melanoma_sensitivity=0.95,
    melanoma_sensitivity_bound=0.78,
    melanoma_specificity=0.5,
)


def comparison(**changed: object) -> Comparison:
    case = ChangedCase(
        "ISIC_1",
        "MEL",
        CaseView("MEL", ("MEL", "NV"), "decided", "urgent"),
        CaseView("NV", ("NV",), "decided", "routine"),
    )
    whole = Comparison(
        live=FIGURES,
        candidate=FIGURES,
        paired={"first answer right": PairedCounts(100, 1, 0, 1.0)},
        subgroups={
            "sex: female": Subgroup(60, 0.8, 0.8, 0.9, NAN),
            "sex: male": Subgroup(10, 0.9, 0.2, NAN, NAN),
        },
        changed=(case,),
        malignant_images=40,
        malignant_downgrades=1,
        malignant_upgrades=0,
    )
    return replace(whole, **changed)


@pytest.mark.parametrize(
    ("criterion", "limit", "candidate", "kept"),
    [
        ("min_top1", 0.81, {}, False),
        ("max_top1_loss", 0.0, {}, True),
        ("max_top1_loss", 0.0, {"top1": 0.79}, False),
        ("max_ece", 0.02, {"ece": 0.021}, False),
        ("min_melanoma_auc", 0.9, {"melanoma_auc": NAN}, False),
        ("max_melanoma_sensitivity_loss", 0.0, {"melanoma_sensitivity": 0.9}, False),
        ("min_melanoma_sensitivity_bound", 0.75, {}, True),
        ("max_melanoma_specificity_loss", 0.05, {"melanoma_specificity": 0.4}, False),
        ("max_malignant_downgrade_share", 0.02, {}, False),
        ("max_subgroup_top1_loss", 0.05, {}, True),  # the small group is not judged
    ],
)
def test_each_criterion_is_judged(criterion: str, limit: float, candidate: dict, *, kept: bool) -> None:
    compared = comparison(candidate=replace(FIGURES, **candidate))
    (verdict,) = judge(AcceptancePlan(**{criterion: limit}), compared)
    assert (verdict.criterion, verdict.limit, verdict.kept) == (criterion, limit, kept)


@pytest.mark.parametrize(("upgrades", "kept"), [(0, False), (1, True), (2, True)])
def test_what_becomes_more_urgent_is_taken_off_the_excess_and_not_off_the_share(
    upgrades: int, *, kept: bool
) -> None:
    compared = comparison(malignant_upgrades=upgrades)
    assert judge(AcceptancePlan(max_malignant_downgrade_excess=0.01), compared)[0].kept is kept
    assert not judge(AcceptancePlan(max_malignant_downgrade_share=0.01), compared)[0].kept


def test_a_subgroup_criterion_without_a_large_group_is_not_kept() -> None:
    plan = AcceptancePlan(max_subgroup_top1_loss=1.0, subgroup_images=1000)
    (verdict,) = judge(plan, comparison())
    assert not verdict.kept
    assert not judge(AcceptancePlan(max_subgroup_top1_loss=0.5, subgroup_images=5), comparison())[0].kept


def test_the_report_holds_everything_and_is_json() -> None:
    verdicts = judge(AcceptancePlan(min_top1=0.9), comparison())
    content = json.loads(report_json(comparison(), verdicts, {"reason": "update"}))
    assert content["accepted"] is False
    assert content["changed"][0]["changes"] == ["top1", "prediction_set", "urgency"]
    assert content["changed"][0]["downgraded"] is True
    assert content["subgroups"]["sex: female"]["candidate_melanoma_auc"] is None
    assert (content["malignant_downgrades"], content["malignant_upgrades"]) == (1, 0)
    assert "less urgent referral: 1 of 40; with a more urgent one: 3" in report_text(
        comparison(malignant_upgrades=3), verdicts
    )


def test_a_refused_image_counts_as_less_urgent_than_any() -> None:
    seen, refused = CaseView("NV", (), "decided", "routine"), CaseView("NV", (), "refused", "")
    worse, better = ChangedCase("ISIC_1", "NV", seen, refused), ChangedCase("ISIC_1", "NV", refused, seen)
    assert (worse.downgraded, worse.upgraded) == (True, False)
    assert (better.downgraded, better.upgraded) == (False, True)


@pytest.mark.parametrize("name", ["efficientnet_b4", "mobilenetv3_large_100"])
def test_the_recipes_carry_criteria(name: str) -> None:
    path = RECIPES / f"{name}.toml"
    plan = read_recipe(path).acceptance
    assert plan is not None
    assert plan.max_melanoma_sensitivity_loss == 0.0
    assert parse_acceptance(path.read_text(), path) == plan
    assert len(judge(plan, comparison())) >= 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[acceptance]\nmin_topp1 = 0.5", "min_topp1"),
        ("[acceptance]\nsubgroup_images = 5", "no criterion"),
        ("[acceptance]\nmin_top1 = nan", "must be a number"),
        ("seed = 1", "no \\[acceptance\\]"),
        ("acceptance = 5", "TOML|attribute|iterable|int"),
    ],
)
def test_criteria_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DermError, match=message):
        parse_acceptance(text, tmp_path / "recipe.toml")

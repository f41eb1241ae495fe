"""The policy file is read strictly, overridden strictly, and never weakens a guideline."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from deployments.risk.policy import (
    CURRENT_VERSION,
    POLICIES,
    PolicyError,
    read_policy,
    read_table,
    with_overrides,
)


def table() -> dict[str, Any]:
    return tomllib.loads((POLICIES / f"{CURRENT_VERSION}.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(path.stem for path in POLICIES.glob("*.toml")))
def test_every_shipped_policy_loads(path):
    assert read_policy(path).version == path


@pytest.mark.parametrize("path", ["version", "review.min_margin", "quality.soft.max_dark", "rules.bcc"])
def test_what_is_missing_or_unknown_is_named(path):
    *tables, key = path.split(".")
    missing, misspelt = table(), table()
    for raw in (missing, misspelt):
        holder = raw
        for name in tables:
            holder = holder[name]
        value = holder.pop(key)
        if raw is misspelt:
            holder |= {key: value, f"{key}s": value}
    with pytest.raises(PolicyError, match=re.escape(f"Missing from the risk policy: {path}.")):
        read_table(missing)
    with pytest.raises(PolicyError, match=re.escape(f"Unknown in the risk policy: {path}s.")):
        read_table(misspelt)


def test_policies_that_are_not_there_or_not_toml(tmp_path):
    with pytest.raises(PolicyError, match="no risk policy"):
        read_policy("1999-01.1")
    (tmp_path / "x.toml").write_text("= nonsense")
    with pytest.raises(PolicyError, match="not TOML"):
        read_policy("x", folder=tmp_path)
    (tmp_path / "y.toml").write_text((POLICIES / f"{CURRENT_VERSION}.toml").read_text(encoding="utf-8"))
    with pytest.raises(PolicyError, match="calls itself"):
        read_policy("y", folder=tmp_path)


def test_an_override_changes_one_number_and_the_version(policy):
    changed = with_overrides(policy, {"review": {"min_margin": 0.15}})
    assert changed.review.min_margin == 0.15
    assert changed.review.max_set_size == policy.review.max_set_size
    assert re.fullmatch(r"2026-11\.4\+[0-9a-f]{8}", changed.version)
    assert policy.version == "2026-11.4"
    thresholds = {"melanoma": {"threshold": 0.05}, "ak": {"threshold": "malignant"}}
    rules = with_overrides(policy, {"rules": {"checklist": {"refer_at": 2}, **thresholds}}).rules
    assert rules.checklist.refer_at == 2
    assert (rules.melanoma.threshold, rules.ak.threshold) == (0.05, "malignant")


def test_the_version_names_the_numbers(policy):
    one = with_overrides(policy, {"review": {"min_margin": 0.15}, "refusal": {"max_unknown": 0.9}})
    same = with_overrides(
        with_overrides(policy, {"refusal": {"max_unknown": 0.9}}),
        {"review": {"min_margin": 0.15, "max_set_size": 3}},
    )
    assert one == same
    assert one.version != with_overrides(policy, {"review": {"min_margin": 0.16}}).version


@pytest.mark.parametrize("nothing", [{}, {"review": {}}, {"review": {"min_margin": 0.1}}])
def test_nothing_changed_keeps_the_version(policy, nothing):
    assert with_overrides(policy, nothing) is policy


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"reviews": {}}, "reviews"),
        ({"review": {"min_margins": 0.1}}, "review.min_margins"),
        ({"rules": {"bcc": {"treshold": 0.1}}}, "rules.bcc.treshold"),
        ({"review": 3}, "review"),
        ({"review": {"min_margin": "wide"}}, "review.min_margin"),
        ({"review": {"min_margin": True}}, "review.min_margin"),
        ({"review": {"min_margin": 1.5}}, "review.min_margin"),
        ({"quality": {"hard": {"min_sharpness": float("nan")}}}, "quality.hard.min_sharpness"),
        ({"rules": {"scc": {"threshold": None}}}, "rules.scc.threshold"),
        ({"review": {"unfamiliar_sites": ["elbow"]}}, "review.unfamiliar_sites"),
        ({"rules": {"scc": {"urgency": "soon"}}}, "rules.scc.urgency"),
        ({"version": "mine"}, "version"),
    ],
)
def test_a_wrong_override_is_refused_by_name(policy, overrides, named):
    with pytest.raises(PolicyError, match=re.escape(named)):
        with_overrides(policy, overrides)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"rules": {"checklist": {"refer_at": 4}}}, "NICE NG12"),
        ({"rules": {"checklist": {"refer_at": 0}}}, "NICE NG12"),
        ({"rules": {"checklist": {"urgency": "routine"}}}, "NICE NG12"),
        ({"rules": {"checklist": {"level": "medium"}}}, "NICE NG12"),
        ({"quality": {"soft": {"min_sharpness": 1.0}}}, "within quality.hard"),
        ({"review": {"max_unknown": 0.99}}, "refusal.max_unknown"),
        ({"rules": {"unknown": {"threshold": 0.6}}}, "review.max_unknown"),
        ({"rules": {"unknown": {"threshold": "melanoma"}}}, "must be a number"),
        ({"score": {"severity": {"bcc": 0.9}}}, "score.severity"),
        ({"score": {"bands": {"medium": 0.7}}}, "score.bands"),
        ({"review": {"max_set_size": 0}}, "max_set_size"),
    ],
)
def test_a_policy_may_not_contradict_itself_or_a_guideline(policy, overrides, complaint):
    with pytest.raises(PolicyError, match=complaint):
        with_overrides(policy, overrides)


def test_the_limits_of_sharpness_were_measured_at_the_size_of_the_model_that_answers(policy, model):
    _, height, width = model.manifest.input.input_size
    assert height == width == policy.quality.input_side

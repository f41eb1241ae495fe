"""The risk stage's canaries: committed conclusions under shipped policies, and what holds under any."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.risk import risk
from deployments.risk.canary import _KNOWN, POINTS, known_answers
from deployments.risk.policy import POLICIES, digest_numbers, read_policy
from deployments.risk.risk import RiskStage, conclude
from model_store.registry import ModelStore
from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.errors import StageFailed
from serve_app.records.serving import LiveModel


@pytest.fixture
def stage(models: Path, model_id: str) -> RiskStage:
    store = ModelStore(models)
    stage = RiskStage(store, read_policy().version)
    model = store.open(model_id)
    stage.warm([LiveModel(model_id, model.digest, model.manifest.live_space.embedding_space)])
    return stage


def test_every_shipped_policy_has_its_known_answers() -> None:
    """A change of a rule that changes one of these needs a new policy, or was none that was meant."""
    shipped = sorted(path.stem for path in POLICIES.glob("*.toml"))
    found = {
        version: known_answers(policy, lambda case, policy=policy: conclude(case, policy, POINTS))
        for version, policy in ((version, read_policy(version)) for version in shipped)
    }
    assert json.loads(_KNOWN.read_text()) == found
    levels = {
        tuple(answer["risk"][:2])
        for answer in found[shipped[-1]].values()
        if isinstance(answer, dict) and answer["risk"]
    }
    assert levels == {("low", "routine"), ("medium", "routine"), ("medium", "expedited"), ("high", "urgent")}


async def test_a_stage_is_right_with_the_shipped_policy_and_with_a_sites_numbers(stage) -> None:
    assert await stage.prove() == 0.0
    for overrides in (
        {"review": {"min_margin": 0.3}},
        {"rules": {"checklist": {"refer_at": 1}, "melanoma": {"threshold": 1.0, "level": "low"}}},
        {"quality": {"soft": {"min_sharpness": 20.0}}, "score": {"bands": {"medium": 0.9, "high": 0.95}}},
    ):
        stage.override(overrides)
        assert await stage.prove() == 0.0


async def test_a_sites_own_file_is_held_to_the_rules_alone(stage) -> None:
    stage._shipped = stage._policy = stage._shipped.model_copy(update={"version": "2027-clinic"})
    assert await stage.prove() is None


def _change(model, **values: object) -> None:
    """As a bit that falls over in memory: these tables cannot be assigned to."""
    for name, value in values.items():
        model.__dict__[name] = value


@pytest.mark.parametrize("overrides", [{}, {"review": {"min_margin": 0.3}}], ids=["shipped", "the site's"])
async def test_a_number_that_changed_in_memory_is_found(stage, overrides) -> None:
    stage.override(overrides)
    before = digest_numbers(stage._policy)
    _change(stage._policy.rules.melanoma, threshold=0.9)
    assert digest_numbers(stage._policy) != before
    with pytest.raises(StageFailed):
        await stage.prove()


@pytest.mark.parametrize(
    "broken",
    [
        {"demands_referral": lambda *_: False},
        {"_is_distribution": lambda _: True},
        {"LEVELS": (RiskLevel.HIGH, RiskLevel.MEDIUM, RiskLevel.LOW)},
        {"URGENCIES": (Urgency.URGENT, Urgency.EXPEDITED, Urgency.ROUTINE)},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_a_rule_that_went_wrong_is_found_under_any_policy(stage, broken, monkeypatch) -> None:
    stage._shipped = stage._policy = stage._shipped.model_copy(update={"version": "2027-clinic"})
    for name, value in broken.items():
        monkeypatch.setattr(risk, name, value)
    with pytest.raises(StageFailed):
        await stage.prove()

"""The conclusion: outcome, reasons, risk level, urgency and score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
import logging
import math
from typing import Any

from deployments.canary import Off
from deployments.risk.canary import POINTS, prove_in_force, prove_shipped
from deployments.risk.doubts import doubt_patient, find_doubts, judge_quality
from deployments.risk.policy import RiskPolicy, ScorePolicy, at_site, read_policy, with_overrides
from deployments.risk.rules import (
    LEVELS,
    URGENCIES,
    Effect,
    Evidence,
    Findings,
    demands_referral,
    expected_severity,
    weigh,
)
from model_store.registry import ModelStore
from serve_app.domain.assessment import (
    CHECKLIST_REFERS,
    Classification,
    Conclusion,
    Outcome,
    Quality,
    Reason,
    Risk,
    RiskLevel,
    Urgency,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import StageFailed
from serve_app.domain.patient import ClinicalContext
from serve_app.records.serving import LiveModel

_STRENGTH = tuple(Effect)
_log = logging.getLogger("derm.canary")


def conclude(findings: Findings, policy: RiskPolicy, operating_points: Mapping[str, float]) -> Conclusion:
    """Conclude one assessment; `operating_points` maps the names of the live model's to thresholds.

    When the outcome is `refused`, the answer must show neither classification nor neighbours.
    Raises StageFailed for probabilities that are none, so that nothing is concluded from them,
    and ModelContractError when the model lacks an operating point that the policy names.
    """
    classification, context = findings.classification, findings.context
    verdict = judge_quality(findings.quality, policy.quality)
    quality = Quality(
        **asdict(findings.quality),
        width=findings.width,
        height=findings.height,
        acceptable=verdict.acceptable,
    )
    if not verdict.acceptable:
        return _refuse(verdict.refusals, quality, context, policy)
    if not _is_distribution(classification):
        raise StageFailed("The classifier gave no valid probabilities.")
    unknown = classification.probabilities[Diagnosis.UNK]
    if unknown >= policy.refusal.max_unknown:
        return _refuse((_not_dermoscopy(unknown, policy), *verdict.concerns), quality, context, policy)
    severity = expected_severity(classification, policy.score.severity)
    risk = _risk(severity, list(weigh(findings, policy, operating_points)), policy)
    before = findings.compared_level
    falls = before is not None and LEVELS.index(risk.level) < LEVELS.index(before)
    reasons = (*verdict.concerns, *find_doubts(findings, policy.review, falls=falls))
    return Conclusion(Outcome.REVIEW if reasons else Outcome.DECIDED, reasons, quality, risk, policy.version)


def _risk(severity: float, evidence: Sequence[Evidence], policy: RiskPolicy) -> Risk:
    """Join the evidence: highest level, most urgent, score lifted to the band of the level."""
    left = (1.0 - severity) * math.prod(1.0 - item.raises for item in evidence)
    score = 1.0 - left
    banded_level, banded_urgency = _band(score, policy.score)
    level = max(banded_level, *(item.level for item in evidence), key=LEVELS.index)
    urgency = max(banded_urgency, *(item.urgency for item in evidence), key=URGENCIES.index)
    bands = policy.score.bands
    least = {RiskLevel.LOW: 0.0, RiskLevel.MEDIUM: bands.medium, RiskLevel.HIGH: bands.high}[level]
    ordered = sorted(evidence, key=lambda item: _STRENGTH.index(item.effect))
    return Risk(
        level=level,
        urgency=urgency,
        score=round(max(score, least), 4),
        factors=tuple(item.factor for item in ordered),
        policy_version=policy.version,
    )


def _band(score: float, policy: ScorePolicy) -> tuple[RiskLevel, Urgency]:
    if score >= policy.bands.high:
        return RiskLevel.HIGH, policy.bands.high_urgency
    return (RiskLevel.MEDIUM if score >= policy.bands.medium else RiskLevel.LOW), Urgency.ROUTINE


def _refuse(
    reasons: tuple[Reason, ...], quality: Quality, context: ClinicalContext, policy: RiskPolicy
) -> Conclusion:
    """No answer; but what the clinician's own checklist demands stands without an image."""
    reasons += tuple(doubt_patient(context.record))
    checklist = context.checklist
    if checklist is not None and demands_referral(checklist, policy.rules.checklist):
        reasons += (
            Reason(
                CHECKLIST_REFERS,
                f"The image gave no answer, but the 7-point checklist has {checklist.score} points.",
                "Refer on the suspected-cancer pathway (NICE NG12) without waiting for another image.",
            ),
        )
    return Conclusion(Outcome.REFUSED, reasons, quality, None, policy.version)


def _not_dermoscopy(unknown: float, policy: RiskPolicy) -> Reason:
    return Reason(
        "not_dermoscopic",
        f"The image does not look like dermoscopy of a skin lesion: p(UNK) {unknown:.0%} "
        f"(limit {policy.refusal.max_unknown:.0%}); no assessment was made.",
        "Check that the right image was sent, and take a dermoscopic image of one lesion.",
    )


def _is_distribution(classification: Classification) -> bool:
    """Whether the nine are there, finite, not negative and sum to 1."""
    p = classification.probabilities
    return (
        set(p) == set(Diagnosis)
        and all(math.isfinite(value) and value >= 0.0 for value in p.values())
        and math.isclose(sum(p.values()), 1.0, abs_tol=1e-3)
    )


class RiskStage:
    """A policy and the operating points of the models it is asked about; without Ray."""

    def __init__(self, store: ModelStore, policy_version: str) -> None:
        self._store = store
        self._shipped = read_policy(policy_version)
        self._policy = self._shipped
        self._held: tuple[LiveModel, ...] = ()

    def warm(self, models: Iterable[LiveModel]) -> dict[str, str]:
        """Read these models' operating points; returns the models' digests by id."""
        held = tuple(models)
        digests = self._store.warm(held)
        self._held = held
        return digests

    def override(self, overrides: dict[str, Any]) -> None:
        """Change thresholds of the shipped policy. Raises PolicyError for an unknown key."""
        self._policy = with_overrides(self._shipped, overrides)

    async def conclude(self, model: LiveModel, findings: Findings) -> Conclusion:
        """Conclude outcome, risk and urgency at the model's operating points, or those the site has set for it."""
        points = (await self._store.opened(model.model_id)).manifest.operating_points
        thresholds = {name: point.threshold for name, point in points.items()} | dict(model.operating_points)
        return conclude(findings, at_site(self._policy, model.operating_points), thresholds)

    async def prove(self) -> Off:
        """Put the known cases to this stage; 0 when it is right, None when nothing is known of its policy but the rules.

        Raises StageFailed when a conclusion is not what it must be.
        """
        known = prove_shipped(self._shipped, lambda case: conclude(case, self._shipped, POINTS))
        if not known:
            _log.warning(
                "No conclusion is known of this policy: its canary asks only what every policy must keep."
            )
        for model in self._held:
            await prove_in_force(self._policy, partial(self.conclude, model))
        return 0.0 if known else None

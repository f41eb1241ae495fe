"""The conclusion: outcome, reasons, risk level, urgency and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
import math

from deployments.preprocess.quality import QualityMeasures
from deployments.risk.case_rules import weigh_change, weigh_neighbours
from deployments.risk.context_rules import demands_referral, weigh_context
from deployments.risk.diagnosis_rules import expected_severity, weigh_diagnoses
from deployments.risk.doubts import doubt_lesion, find_doubts
from deployments.risk.evidence import Effect, Evidence, highest_level, most_urgent
from deployments.risk.policy import RiskPolicy
from deployments.risk.policy_tables import ScorePolicy
from deployments.risk.quality_gate import judge_quality
from deployments.risk.record_check import doubt_identity, state_record
from serve_app.domain.assessment import (
    CHECKLIST_REFERS,
    Change,
    Classification,
    Conclusion,
    Neighbours,
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

_STRENGTH = tuple(Effect)


def conclude(
    *,
    quality: QualityMeasures,
    width: int,
    height: int,
    classification: Classification,
    neighbours: Neighbours,
    context: ClinicalContext,
    change: Change | None,
    operating_points: Mapping[str, float],
    policy: RiskPolicy,
    compared_level: RiskLevel | None = None,
) -> Conclusion:
    """Conclude one assessment; `operating_points` maps the names of the live model's to thresholds.

    `compared_level` is the risk level of the image that `change` is since.

    When the outcome is `refused`, the answer must show neither classification nor neighbours.
    Raises StageFailed for probabilities that are none, so that nothing is concluded from them,
    and ModelContractError when the model lacks an operating point that the policy names.
    """
    verdict = judge_quality(quality, policy.quality)
    shown = Quality(**asdict(quality), width=width, height=height, acceptable=verdict.acceptable)
    if not verdict.acceptable:
        return _refuse(verdict.refusals, shown, context, policy)
    if not _is_distribution(classification):
        raise StageFailed("The classifier gave no valid probabilities.")
    unknown = classification.probabilities[Diagnosis.UNK]
    if unknown >= policy.refusal.max_unknown:
        return _refuse((_not_dermoscopy(unknown, policy), *verdict.concerns), shown, context, policy)
    evidence = [
        *weigh_diagnoses(classification, context, policy.rules, operating_points),
        *weigh_context(context, policy),
        *state_record(context.record),
        *weigh_neighbours(neighbours, policy),
        *weigh_change(change, policy),
    ]
    risk = _risk(expected_severity(classification, policy.score.severity), evidence, policy)
    falls = compared_level is not None and highest_level([risk.level, compared_level]) is not risk.level
    reasons = (
        *verdict.concerns,
        *doubt_identity(context.record),
        *doubt_lesion(change, policy.review, falls=falls),
        *find_doubts(classification, neighbours, context, policy.review),
    )
    return Conclusion(Outcome.REVIEW if reasons else Outcome.DECIDED, reasons, shown, risk, policy.version)


def _risk(severity: float, evidence: Sequence[Evidence], policy: RiskPolicy) -> Risk:
    """Join the evidence: highest level, most urgent, score lifted to the band of the level."""
    left = (1.0 - severity) * math.prod(1.0 - item.raises for item in evidence)
    score = 1.0 - left
    banded_level, banded_urgency = _band(score, policy.score)
    level = highest_level([banded_level, *(item.level for item in evidence)])
    urgency = most_urgent([banded_urgency, *(item.urgency for item in evidence)])
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
    reasons += tuple(doubt_identity(context.record))
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

"""One whole risk policy, which refuses to contradict itself or to weaken a guideline."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.risk.policy_tables import QualityPolicy, RefusalPolicy, ReviewPolicy, Rules, ScorePolicy
from deployments.risk.strict_table import PolicyError
from serve_app.domain.assessment import RiskLevel, Urgency

NG12_REFER_AT = 3


@dataclass(frozen=True, slots=True)
class RiskPolicy:
    """One whole policy; `version` is what an answer names as `policy_version`."""

    version: str
    quality: QualityPolicy
    refusal: RefusalPolicy
    review: ReviewPolicy
    rules: Rules
    score: ScorePolicy

    def __post_init__(self) -> None:
        """Refuse a policy that contradicts itself or weakens what a guideline demands."""
        if problems := _problems(self):
            raise PolicyError(f"Policy {self.version}: {'; '.join(problems)}.")


def _problems(policy: RiskPolicy) -> list[str]:
    hard, soft, severity = policy.quality.hard, policy.quality.soft, policy.score.severity
    checks = {
        f"rules.checklist.refer_at must be 1 to {NG12_REFER_AT} (NICE NG12)": (
            1 <= policy.rules.checklist.refer_at <= NG12_REFER_AT
        ),
        "rules.checklist must demand high and urgent (NICE NG12)": (
            policy.rules.checklist.level is RiskLevel.HIGH
            and policy.rules.checklist.urgency is Urgency.URGENT
        ),
        "quality.soft must lie within quality.hard": (
            soft.min_sharpness >= hard.min_sharpness >= 0
            and soft.min_exposure >= hard.min_exposure
            and soft.max_exposure <= hard.max_exposure
            and soft.min_contrast >= hard.min_contrast
            and soft.max_dark <= hard.max_dark
            and soft.max_bright <= hard.max_bright
            and soft.min_colour >= hard.min_colour >= 0
            and soft.max_two_levels <= hard.max_two_levels
            and soft.max_damaged <= hard.max_damaged
        ),
        "review.max_unknown must not exceed refusal.max_unknown": (
            policy.review.max_unknown <= policy.refusal.max_unknown
        ),
        "review.same_lesion must not exceed review.same_lesion_if_lower": (
            policy.review.same_lesion <= policy.review.same_lesion_if_lower
        ),
        "rules.unknown.threshold must be a number, at most review.max_unknown": (
            not isinstance(policy.rules.unknown.threshold, str)
            and policy.rules.unknown.threshold <= policy.review.max_unknown
        ),
        "score.severity must fall from mel over scc and bcc to ak, and unk must not exceed mel": (
            severity.mel >= severity.scc >= severity.bcc >= severity.ak and severity.unk <= severity.mel
        ),
        "score.bands.medium must be above 0 and below high": (
            0 < policy.score.bands.medium < policy.score.bands.high
        ),
        "review.max_set_size must be at least 1": policy.review.max_set_size >= 1,
    }
    return [problem for problem, kept in checks.items() if not kept]

"""What similar confirmed cases and the lesion's own past add."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.risk.evidence import Effect, Evidence
from deployments.risk.policy import RiskPolicy
from serve_app.domain.assessment import Change, Neighbours


def weigh_neighbours(neighbours: Neighbours, policy: RiskPolicy) -> Iterator[Evidence]:
    """Weigh the share of malignant cases among the nearest, and whether a malignant one is the nearest by far."""
    if neighbours.malignant_share is None:
        yield Evidence(
            "neighbours_not_available", Effect.NOT_AVAILABLE, "No similar confirmed cases were available."
        )
        return
    rule, raises = policy.rules.neighbours, policy.score.raises
    share = neighbours.malignant_share
    raised = raises.neighbours * min(max(share, 0.0), 1.0)
    message = f"{share:.0%} of the {len(neighbours.similar)} most similar confirmed cases are malignant"
    if share >= rule.malignant_share:
        message += f" (threshold {rule.malignant_share:.0%})."
        yield Evidence("neighbours", Effect.DEMANDS, message, raised, rule.level, rule.urgency)
    else:
        yield Evidence("neighbours", Effect.RAISES if raised > 0 else Effect.NONE, f"{message}.", raised)
    malignant, benign = neighbours.nearest_malignant, neighbours.nearest_benign
    if malignant is None:
        return
    lead = malignant.similarity - (benign.similarity if benign else -1.0)
    if lead >= policy.score.limits.similarity_lead:
        message = (
            f"The most similar malignant case ({malignant.diagnosis.display_name.lower()}, similarity "
            f"{malignant.similarity:.2f}) is closer than the most similar benign one."
        )
        yield Evidence("nearest_malignant", Effect.RAISES, message, raises.nearest_malignant)


def weigh_change(change: Change | None, policy: RiskPolicy) -> Iterator[Evidence]:
    """Weigh a rise of the melanoma probability, and a changed appearance, since the lesion's last image."""
    if change is None:
        return
    rule, since = policy.rules.change, change.since
    rise = change.melanoma_probability_delta
    if rise is not None and rise >= rule.melanoma_rise:
        message = (
            f"The melanoma probability rose by {100 * rise:.1f} percentage points since {since} "
            f"(threshold {100 * rule.melanoma_rise:.1f})."
        )
        yield Evidence("melanoma_rise", Effect.DEMANDS, message, level=rule.level, urgency=rule.urgency)
    limit = policy.score.limits.min_similarity
    if change.similarity is not None and change.similarity < limit:
        message = (
            f"The lesion looks different from its image of {since}: similarity {change.similarity:.2f} "
            f"(expected at least {limit:.2f})."
        )
        yield Evidence("appearance_change", Effect.RAISES, message, policy.score.raises.appearance_change)

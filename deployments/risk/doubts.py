"""Why a clinician must look before the answer is used: each doubt with its numbers and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.risk.diagnosis_rules import known_probabilities
from deployments.risk.policy_tables import ReviewPolicy
from serve_app.domain.assessment import ANOTHER_LESION, Change, Classification, Neighbours, Reason
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.patient import ClinicalContext

_JUDGE = "Judge the lesion clinically and by dermoscopy; do not rely on the ranking."


def find_doubts(
    classification: Classification,
    neighbours: Neighbours,
    context: ClinicalContext,
    policy: ReviewPolicy,
) -> Iterator[Reason]:
    """Every doubt about this answer that the policy asks a clinician to look at."""
    yield from _unfamiliar(classification, context, policy)
    yield from _undecided(classification, policy)
    yield from _disagreeing(classification, neighbours, policy)


def doubt_lesion(change: Change | None, policy: ReviewPolicy, *, falls: bool) -> Iterator[Reason]:
    """A doubt whether a follow-up shows the lesion it was sent for; sooner when its risk level `falls`."""
    limit = policy.same_lesion_if_lower if falls else policy.same_lesion
    if change is None or limit <= 0.0:
        return
    if change.similarity is None:
        yield Reason(
            "identity_not_checked",
            f"Whether this is the lesion of the image of {change.since} was not checked: another model looked at that.",
            "Compare the two images and the site before the answer is used.",
        )
    elif change.similarity < limit:
        yield Reason(
            ANOTHER_LESION,
            f"The image looks unlike the lesion's image of {change.since}: similarity {change.similarity:.2f} "
            f"(limit {limit:.2f}{', because the risk level would fall' if falls else ''}).",
            "Compare the two images and the site. If it is the same lesion, confirm the image; if not, send it "
            "again as a lesion of its own. What the earlier images demand stands either way.",
        )


def _unfamiliar(
    classification: Classification, context: ClinicalContext, policy: ReviewPolicy
) -> Iterator[Reason]:
    unknown = classification.probabilities[Diagnosis.UNK]
    if unknown >= policy.max_unknown:
        yield Reason(
            "out_of_distribution",
            f"The image is unlike those the model knows: p(UNK) {unknown:.0%} (limit {policy.max_unknown:.0%}).",
            "Check that this is a dermoscopic image of one skin lesion. If it is, judge the lesion without "
            "the model.",
        )
    if (site := context.anatom_site_general) is not None and site in policy.unfamiliar_sites:
        yield Reason(
            "unfamiliar_site",
            f"The model has seen very few lesions of this site ({site}).",
            "Judge the lesion clinically; melanoma looks different here and is easily missed.",
        )


def _undecided(classification: Classification, policy: ReviewPolicy) -> Iterator[Reason]:
    members = classification.prediction_set
    names = ", ".join(d.display_name for d in members)
    if not members:
        yield Reason(
            "empty_prediction_set",
            f"No known diagnosis fits at the {classification.coverage:.0%} coverage level.",
            f"The lesion may be of a kind the model does not know. {_JUDGE}",
        )
    elif len(members) > policy.max_set_size:
        yield Reason(
            "wide_prediction_set",
            f"{len(members)} diagnoses remain possible at the {classification.coverage:.0%} coverage level "
            f"(limit {policy.max_set_size}): {names}.",
            _JUDGE,
        )
    known = known_probabilities(classification)
    first, second = sorted(known, key=lambda d: -known[d])[:2]
    if (margin := known[first] - known[second]) < policy.min_margin:
        yield Reason(
            "low_margin",
            f"{first.display_name} ({known[first]:.0%}) and {second.display_name} ({known[second]:.0%}) are "
            f"{100 * margin:.0f} percentage points apart (limit {100 * policy.min_margin:.0f}).",
            "Weigh both diagnoses; let the more serious one guide what is done.",
        )
    if policy.melanoma_in_set and Diagnosis.MEL in members and first not in MALIGNANT:
        yield Reason(
            "melanoma_not_excluded",
            f"{first.display_name} is most probable ({known[first]:.0%}), yet melanoma "
            f"({known[Diagnosis.MEL]:.0%}) cannot be excluded.",
            "Look for the signs of melanoma before the lesion is taken for benign.",
        )


def _disagreeing(
    classification: Classification, neighbours: Neighbours, policy: ReviewPolicy
) -> Iterator[Reason]:
    if neighbours.malignant_share is None:
        return
    known = known_probabilities(classification)
    first = max(known, key=lambda d: known[d])
    share = neighbours.malignant_share
    says_malignant = first in MALIGNANT
    if share <= policy.neighbours_benign if says_malignant else share >= policy.neighbours_malignant:
        yield Reason(
            "neighbours_disagree",
            f"The model puts {first.display_name} first ({known[first]:.0%}), yet {share:.0%} of the most "
            "similar confirmed cases are malignant.",
            "Compare the lesion with the similar cases shown; do not rely on either alone.",
        )

"""Whether an image is good enough to be judged at all, and why a clinician must look before the answer is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.preprocess.preprocess import QualityMeasures
from deployments.risk.policy import QualityLimits, QualityPolicy, ReviewPolicy
from deployments.risk.rules import known_probabilities
from serve_app.domain.assessment import ANOTHER_LESION, Change, Classification, Neighbours, Reason
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.patient import ClinicalContext


@dataclass(frozen=True, slots=True)
class QualityVerdict:
    """`refusals` leave no answer; `concerns` ask a clinician to look. One measure is in one of them."""

    refusals: tuple[Reason, ...]
    concerns: tuple[Reason, ...]

    @property
    def acceptable(self) -> bool:
        """Whether the image may be classified."""
        return not self.refusals


@dataclass(frozen=True, slots=True)
class _Fault:
    code: str
    measure: str
    is_most: bool  # the limit is the most that is allowed, else the least
    what: str
    action: str
    limit: str
    concern: str = ""  # the code of a soft limit, where it is not `limited_` and the code of the hard one


_FAULTS = (
    _Fault(
        code="blurred",
        measure="sharpness",
        is_most=False,
        what="The image is not sharp: sharpness {value:.1f}, at least {limit:.1f} is needed",
        action="Clean the lens, refocus, steady the dermoscope on the skin and take the image again.",
        limit="min_sharpness",
    ),
    _Fault(
        code="underexposed",
        measure="exposure",
        is_most=False,
        what="The image is dark: mean brightness {value:.0%}, at least {limit:.0%} is needed",
        action="Switch the dermoscope's light on or raise the exposure, and take the image again.",
        limit="min_exposure",
    ),
    _Fault(
        code="overexposed",
        measure="exposure",
        is_most=True,
        what="The image is too bright: mean brightness {value:.0%}, at most {limit:.0%} is usable",
        action="Lower the exposure or the light and take the image again.",
        limit="max_exposure",
    ),
    _Fault(
        code="low_contrast",
        measure="contrast",
        is_most=False,
        what="Hardly any structure can be seen: contrast {value:.1%}, at least {limit:.1%} is needed",
        action="Check that the lesion is in view and the lens is clear, and take the image again.",
        limit="min_contrast",
    ),
    _Fault(
        code="dark_area",
        measure="dark",
        is_most=True,
        what="Much of the image is black: {value:.0%} of it, at most {limit:.0%} is usable",
        action="Bring the lesion closer or crop the dermoscope's rim, and take the image again.",
        limit="max_dark",
    ),
    _Fault(
        code="glare",
        measure="bright",
        is_most=True,
        what="Much of the image is burnt out: {value:.0%} of it, at most {limit:.0%} is usable",
        action="Avoid glare: use polarised light or immersion fluid, and take the image again.",
        limit="max_bright",
    ),
    _Fault(
        code="no_colour",
        measure="colour",
        is_most=False,
        what="The image has no colours of its own: colour {value:.1f}, at least {limit:.1f} is needed",
        action="Take the image in colour, and send it as the camera stored it.",
        limit="min_colour",
        concern="no_colour",
    ),
    _Fault(
        code="two_levels",
        measure="two_levels",
        is_most=True,
        what="The image has only two levels of brightness: {value:.0%} of it, at most {limit:.0%} is usable",
        action="Send the image in colour, as the camera stored it, and not a scan or a fax of it.",
        limit="max_two_levels",
    ),
    _Fault(
        code="damaged_image",
        measure="damaged",
        is_most=True,
        what="The file is damaged: {value:.1%} of the image or more is missing or wrong, at most {limit:.1%} is usable",
        action="Send the file again from where it was first stored, or take the image again.",
        limit="max_damaged",
        concern="damaged_image",
    ),
)


def judge_quality(measures: QualityMeasures, policy: QualityPolicy) -> QualityVerdict:
    """Hold the measures against the hard limits, and what passes them against the soft ones."""
    refused = [fault for fault in _FAULTS if _is_beyond(fault, measures, policy.hard)]
    doubtful = [f for f in _FAULTS if f not in refused and _is_beyond(f, measures, policy.soft)]
    return QualityVerdict(
        refusals=tuple(_reason(fault, measures, policy.hard, is_concern=False) for fault in refused),
        concerns=tuple(_reason(fault, measures, policy.soft, is_concern=True) for fault in doubtful),
    )


def _is_beyond(fault: _Fault, measures: QualityMeasures, limits: QualityLimits) -> bool:
    value: float = getattr(measures, fault.measure)
    limit: float = getattr(limits, fault.limit)
    return not (value <= limit if fault.is_most else value >= limit)


def _reason(fault: _Fault, measures: QualityMeasures, limits: QualityLimits, *, is_concern: bool) -> Reason:
    message = fault.what.format(value=getattr(measures, fault.measure), limit=getattr(limits, fault.limit))
    return Reason(
        code=(fault.concern or f"limited_{fault.code}") if is_concern else fault.code,
        message=message + (" for a reliable answer." if is_concern else "; no assessment was made."),
        action="Read the answer with care. " + fault.action if is_concern else fault.action,
    )


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

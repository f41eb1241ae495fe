"""Whether an image is good enough to be judged at all, and why a clinician must look before the answer is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployments.risk.policy import QualityLimits, QualityPolicy, ReviewPolicy
from deployments.risk.rules import IDENTITY, Findings, describe_discrepancy, known_probabilities
from serve_app.domain.assessment import (
    ANOTHER_LESION,
    Change,
    Classification,
    Neighbours,
    QualityMeasures,
    Reason,
)
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.patient import ClinicalContext, RecordCheck


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
    """`limit`, a name in QualityLimits, begins with `min_` or `max_` and goes on with the measure's name."""

    code: str
    limit: str
    what: str
    action: str
    concern: str = ""  # the code of a soft limit, where it is not `limited_` and the code of the hard one

    def values(self, measures: QualityMeasures, limits: QualityLimits) -> tuple[float, float]:
        """What was measured, and what is allowed."""
        return getattr(measures, self.limit[4:]), getattr(limits, self.limit)

    def found(self, measures: QualityMeasures, limits: QualityLimits) -> bool:
        """Whether the measure is beyond its limit; what is no number is."""
        value, limit = self.values(measures, limits)
        return not (value <= limit if self.limit.startswith("max_") else value >= limit)

    def reason(self, measures: QualityMeasures, limits: QualityLimits, *, is_concern: bool) -> Reason:
        """Say it of an image that is refused for it, or answered with a concern."""
        value, limit = self.values(measures, limits)
        end, before = (
            (" for a reliable answer.", "Read the answer with care. ") if is_concern else (_NO_ANSWER, "")
        )
        code = (self.concern or f"limited_{self.code}") if is_concern else self.code
        return Reason(code, self.what.format(value=value, limit=limit) + end, before + self.action)


_NO_ANSWER = "; no assessment was made."
_FAULTS = (
    _Fault(
        "blurred",
        "min_sharpness",
        "The image is not sharp: sharpness {value:.1f}, at least {limit:.1f} is needed",
        "Clean the lens, refocus, steady the dermoscope on the skin and take the image again.",
    ),
    _Fault(
        "underexposed",
        "min_exposure",
        "The image is dark: mean brightness {value:.0%}, at least {limit:.0%} is needed",
        "Switch the dermoscope's light on or raise the exposure, and take the image again.",
    ),
    _Fault(
        "overexposed",
        "max_exposure",
        "The image is too bright: mean brightness {value:.0%}, at most {limit:.0%} is usable",
        "Lower the exposure or the light and take the image again.",
    ),
    _Fault(
        "low_contrast",
        "min_contrast",
        "Hardly any structure can be seen: contrast {value:.1%}, at least {limit:.1%} is needed",
        "Check that the lesion is in view and the lens is clear, and take the image again.",
    ),
    _Fault(
        "dark_area",
        "max_dark",
        "Much of the image is black: {value:.0%} of it, at most {limit:.0%} is usable",
        "Bring the lesion closer or crop the dermoscope's rim, and take the image again.",
    ),
    _Fault(
        "glare",
        "max_bright",
        "Much of the image is burnt out: {value:.0%} of it, at most {limit:.0%} is usable",
        "Avoid glare: use polarised light or immersion fluid, and take the image again.",
    ),
    _Fault(
        "no_colour",
        "min_colour",
        "The image has no colours of its own: colour {value:.1f}, at least {limit:.1f} is needed",
        "Take the image in colour, and send it as the camera stored it.",
        concern="no_colour",
    ),
    _Fault(
        "two_levels",
        "max_two_levels",
        "The image has only two levels of brightness: {value:.0%} of it, at most {limit:.0%} is usable",
        "Send the image in colour, as the camera stored it, and not a scan or a fax of it.",
    ),
    _Fault(
        "damaged_image",
        "max_damaged",
        "The file is damaged: {value:.1%} of the image or more is missing or wrong, at most {limit:.1%} is usable",
        "Send the file again from where it was first stored, or take the image again.",
        concern="damaged_image",
    ),
)


def judge_quality(measures: QualityMeasures, policy: QualityPolicy) -> QualityVerdict:
    """Hold the measures against the hard limits, and what passes them against the soft ones."""
    hard, soft = policy.hard, policy.soft
    refused = [fault for fault in _FAULTS if fault.found(measures, hard)]
    doubtful = [fault for fault in _FAULTS if fault not in refused and fault.found(measures, soft)]
    return QualityVerdict(
        refusals=tuple(fault.reason(measures, hard, is_concern=False) for fault in refused),
        concerns=tuple(fault.reason(measures, soft, is_concern=True) for fault in doubtful),
    )


_JUDGE = "Judge the lesion clinically and by dermoscopy; do not rely on the ranking."


def find_doubts(findings: Findings, policy: ReviewPolicy, *, falls: bool) -> Iterator[Reason]:
    """Every doubt about this answer that the policy asks a clinician to look at.

    `falls`: the risk level is lower than that of the image that it was compared with.
    """
    classification, context = findings.classification, findings.context
    yield from doubt_patient(context.record)
    yield from _another_lesion(findings.change, policy, falls=falls)
    yield from _unfamiliar(classification, context, policy)
    yield from _undecided(classification, policy)
    yield from _disagreeing(classification, findings.neighbours, policy)


def doubt_patient(check: RecordCheck | None) -> Iterator[Reason]:
    """A doubt when age or sex are not the record's: the image may be another patient's."""
    found = [each for each in check.discrepancies if each.field in IDENTITY] if check else []
    if found:
        yield Reason(
            "identity_discrepancy",
            " ".join(map(describe_discrepancy, found)),
            "Make sure that image and form are this patient's before the answer is used; correct the one that is wrong.",
        )


def _another_lesion(change: Change | None, policy: ReviewPolicy, *, falls: bool) -> Iterator[Reason]:
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

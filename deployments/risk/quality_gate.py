"""Whether an image is good enough to be judged at all; needs no model."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.preprocess.quality import QualityMeasures
from deployments.risk.policy_tables import QualityLimits, QualityPolicy
from serve_app.domain.assessment import Reason


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

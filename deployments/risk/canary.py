"""Canaries of the risk stage: cases whose conclusion is known before they are asked.

Under a shipped policy every case has one conclusion, committed in `canaries.json`: it tests the rules and
the numbers that were read. A site's own numbers have none, and what the stage said at its start would prove
nothing; but they are named by a digest over themselves, and some conclusions hold under any policy that may
be deployed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
import json
import math
from pathlib import Path
from typing import Any

from deployments.risk.policy import RiskPolicy, digest_numbers
from deployments.risk.rules import Effect, Findings
from serve_app.domain.assessment import (
    CHECKLIST_REFERS,
    Classification,
    Conclusion,
    Neighbours,
    Outcome,
    QualityMeasures,
    RiskLevel,
    Urgency,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import StageFailed
from serve_app.domain.patient import AnatomSite, Checklist, ClinicalContext, History

_KNOWN = Path(__file__).with_name("canaries.json")
#: Stand in for a model's operating points in the cases below.
POINTS = {"melanoma": 0.08, "malignant": 0.15}

_GOOD = QualityMeasures(
    sharpness=60.0, exposure=0.6, contrast=0.1, dark=0.0, bright=0.0, colour=6.0, two_levels=0.1, damaged=0.0
)
_NOTHING = ClinicalContext(anatom_site_general=None, age_approx=40, history=History(), checklist=Checklist())
_THREE_POINTS = replace(_NOTHING, checklist=Checklist(change_in_size=True, oozing=True))


def _found(
    *, context: ClinicalContext = _NOTHING, sharpness: float = 60.0, **probabilities: float
) -> Findings:
    """A well-taken image; NV takes what is left to 1, and the set holds every diagnosis from 0.1."""
    full = dict.fromkeys(Diagnosis, 0.0) | {Diagnosis(name): p for name, p in probabilities.items()}
    full[Diagnosis.NV] = 1.0 - sum(full.values())
    members = tuple(d for d, p in full.items() if p >= 0.1 and d is not Diagnosis.UNK)
    return Findings(
        quality=replace(_GOOD, sharpness=sharpness),
        width=1200,
        height=900,
        classification=Classification(full, members, 0.95, 1.0),
        neighbours=Neighbours((), None, None, None),
        context=context,
        change=None,
    )


#: Effects of a factor that moved the conclusion.
_DID = frozenset({Effect.DEMANDS.value, Effect.RAISES.value})

#: One for each level, urgency and outcome, and for what lifts a case from one to another.
CASES: Mapping[str, Findings] = {
    "naevus": _found(MEL=0.01),
    "melanoma": _found(MEL=0.6),
    "melanoma just suspected": _found(MEL=0.09),
    "melanoma plausible": _found(MEL=0.05),
    "carcinoma of the face": _found(
        BCC=0.9, context=replace(_NOTHING, anatom_site_general=AnatomSite.HEAD_NECK, age_approx=70)
    ),
    "carcinoma of the back": _found(
        BCC=0.9, context=replace(_NOTHING, anatom_site_general=AnatomSite.POSTERIOR_TORSO)
    ),
    "keratosis under immunosuppression": _found(
        AK=0.6, context=replace(_NOTHING, history=History(immunosuppression=True))
    ),
    "naevus with three points": _found(MEL=0.01, context=_THREE_POINTS),
    "unfamiliar": _found(MEL=0.01, UNK=0.4),
    "no dermoscopy": _found(UNK=0.99),
    "blurred": _found(MEL=0.6, sharpness=1.0),
    "blurred with three points": _found(sharpness=1.0, context=_THREE_POINTS),
}


def tell(conclusion: Conclusion) -> dict[str, Any]:
    """What of a conclusion must be as it is known: all that decides, and no wording."""
    risk = conclusion.risk
    return {
        "outcome": conclusion.outcome.value,
        "reasons": [reason.code for reason in conclusion.reasons],
        "risk": risk and [risk.level.value, risk.urgency.value, risk.score],
        "factors": [f.code for f in risk.factors if f.effect in _DID] if risk else [],
    }


def known_answers(policy: RiskPolicy, answer: Callable[[Findings], Conclusion]) -> dict[str, Any]:
    """What `canaries.json` must hold of a shipped policy: its numbers' digest, and every conclusion."""
    return {"numbers": digest_numbers(policy)} | {name: tell(answer(case)) for name, case in CASES.items()}


def prove_shipped(policy: RiskPolicy, answer: Callable[[Findings], Conclusion]) -> bool:
    """Put the cases to a policy as it was shipped; False when nothing is known of it, a site's own.

    Raises StageFailed when a case is concluded otherwise, or the numbers are not those that were shipped.
    """
    known = json.loads(_KNOWN.read_text(encoding="utf-8")).get(policy.version)
    if known is None:
        return False
    found = known_answers(policy, answer)
    if wrong := [name for name in known if found.get(name) != known[name]]:
        raise StageFailed(f"Known cases are concluded otherwise: {', '.join(wrong)}.")
    return True


async def prove_in_force(policy: RiskPolicy, answer: Callable[[Findings], Awaitable[Conclusion]]) -> None:
    """Hold the policy in force to its name, and to what no policy may change (NICE NG12; no image, no guess).

    Raises StageFailed when it is not so.
    """
    _, overridden, digest = policy.version.partition("+")
    if overridden and digest != digest_numbers(policy):
        raise StageFailed("The policy in force does not hold the numbers that its version names.")
    demanded = await answer(CASES["naevus with three points"])
    blurred = await answer(_found(sharpness=math.nan, context=_THREE_POINTS))
    risk, refers = demanded.risk, [r.code for r in blurred.reasons]
    kept = (
        risk is not None
        and (risk.level, risk.urgency) == (RiskLevel.HIGH, Urgency.URGENT)
        and (blurred.outcome, blurred.risk) == (Outcome.REFUSED, None)
        and CHECKLIST_REFERS in refers
    )
    try:
        impossible = await answer(_found(MEL=math.nan))
    except StageFailed:
        impossible = None
    if not kept or impossible is not None:
        raise StageFailed("A rule that every policy keeps is broken.")

"""What the model's probabilities demand: melanoma, SCC, BCC and AK, each weighed on its own."""

from __future__ import annotations

from collections.abc import Mapping

from deployments.risk.evidence import Effect, Evidence
from deployments.risk.policy_tables import Rules, SeverityWeights, Threshold
from serve_app.domain.assessment import Classification, RiskLevel, Urgency
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import ModelContractError
from serve_app.domain.patient import AnatomSite, ClinicalContext

#: Most serious first. A rule compares the probability of its diagnosis *or a more serious one*,
#: so that probability which moves from BCC to melanoma can never take a finding away.
SERIOUSNESS = (Diagnosis.MEL, Diagnosis.SCC, Diagnosis.BCC, Diagnosis.AK, Diagnosis.UNK)

_LEAST_KNOWN = 1e-9
# A probability that misses its threshold by a rounding error has reached it.
_ROUNDING = 1e-9


def known_probabilities(classification: Classification) -> dict[Diagnosis, float]:
    """Divide the eight by 1 - p(UNK): what the calibrated softmax said, on which operating points are fitted.

    Doubt about the image must not make a melanoma look less likely than the model holds it.
    """
    known = max(1.0 - classification.probabilities[Diagnosis.UNK], _LEAST_KNOWN)
    return {d: min(p / known, 1.0) for d, p in classification.probabilities.items() if d is not Diagnosis.UNK}


def threshold_of(threshold: Threshold, operating_points: Mapping[str, float]) -> float:
    """Give a probability, looked up where the policy names an operating point.

    Raises ModelContractError when the model has no such operating point.
    """
    if not isinstance(threshold, str):
        return threshold
    try:
        return operating_points[threshold]
    except KeyError as error:
        has = ", ".join(sorted(operating_points)) or "none"
        raise ModelContractError(
            f"The risk policy needs the operating point {threshold!r}; the model has {has}."
        ) from error


def check_operating_points(rules: Rules, operating_points: Mapping[str, float]) -> None:
    """Raise ModelContractError unless the model has each operating point that the policy names."""
    for rule in (rules.melanoma, rules.scc, rules.bcc, rules.ak):
        threshold_of(rule.threshold, operating_points)


def expected_severity(classification: Classification, weights: SeverityWeights) -> float:
    """Sum severity x probability over the nine; benign diagnoses weigh nothing. 0 to 1.

    The unknown part weighs as much as the known part, and `unk` at least: doubt about an image
    never makes it look less serious.
    """
    p = known_probabilities(classification)
    known = (
        weights.mel * p[Diagnosis.MEL]
        + weights.scc * p[Diagnosis.SCC]
        + weights.bcc * p[Diagnosis.BCC]
        + weights.ak * p[Diagnosis.AK]
    )
    unknown = classification.probabilities[Diagnosis.UNK]
    return min(max((1.0 - unknown) * known + unknown * max(known, weights.unk), 0.0), 1.0)


def weigh_diagnoses(
    classification: Classification,
    context: ClinicalContext,
    rules: Rules,
    operating_points: Mapping[str, float],
) -> list[Evidence]:
    """Apply the five rules on probabilities, most serious first."""
    evidence = [_melanoma(classification, rules, threshold_of(rules.melanoma.threshold, operating_points))]
    known = known_probabilities(classification)
    for diagnosis, threshold, level, urgency, because in _keratinocyte_rules(context, rules):
        mass = _or_more_serious(known, diagnosis)
        limit = threshold_of(threshold, operating_points)
        if mass + _ROUNDING >= limit:
            message = f"{diagnosis.display_name} or more serious: probability {mass:.1%} (threshold {limit:.1%}){because}."
            evidence.append(_demand(diagnosis.value.lower(), message, level, urgency))
    mass = _or_more_serious(classification.probabilities, Diagnosis.UNK)
    if mass + _ROUNDING >= (limit := threshold_of(rules.unknown.threshold, operating_points)):
        message = f"Not one of the known benign diagnoses: probability {mass:.1%} (threshold {limit:.1%})."
        evidence.append(_demand("not_benign", message, rules.unknown.level, rules.unknown.urgency))
    return evidence


def _keratinocyte_rules(
    context: ClinicalContext, rules: Rules
) -> list[tuple[Diagnosis, Threshold, RiskLevel, Urgency, str]]:
    site = context.anatom_site_general
    bcc, ak = rules.bcc, rules.ak
    delay_harms = site in bcc.delay_harmful_sites
    suppressed = context.history.immunosuppression is True
    at_site = (
        f"; delay may do harm at this site ({site})" if isinstance(site, AnatomSite) and delay_harms else ""
    )
    return [
        (Diagnosis.SCC, rules.scc.threshold, rules.scc.level, rules.scc.urgency, ""),
        (
            Diagnosis.BCC,
            bcc.threshold,
            bcc.level,
            bcc.delay_harmful_urgency if delay_harms else bcc.urgency,
            at_site,
        ),
        (
            Diagnosis.AK,
            ak.threshold,
            ak.level,
            ak.immunosuppressed_urgency if suppressed else ak.urgency,
            "; the patient is immunosuppressed" if suppressed else "",
        ),
    ]


def _melanoma(classification: Classification, rules: Rules, threshold: float) -> Evidence:
    probability = known_probabilities(classification)[Diagnosis.MEL]
    numbers = f"probability {probability:.1%} (threshold {threshold:.1%})"
    if probability + _ROUNDING >= threshold:
        message = f"Melanoma: {numbers}."
        return _demand("melanoma", message, rules.melanoma.level, rules.melanoma.urgency)
    plausible = rules.melanoma_plausible
    if (
        Diagnosis.MEL in classification.prediction_set
        or probability + _ROUNDING >= plausible.fraction * threshold
    ):
        message = f"Melanoma is below its threshold but not excluded: {numbers}."
        return _demand("melanoma_plausible", message, plausible.level, plausible.urgency)
    return Evidence("melanoma", Effect.NONE, f"Melanoma: {numbers}.")


def _or_more_serious(probabilities: Mapping[Diagnosis, float], diagnosis: Diagnosis) -> float:
    upto = SERIOUSNESS[: SERIOUSNESS.index(diagnosis) + 1]
    return min(sum(probabilities[d] for d in upto), 1.0)


def _demand(code: str, message: str, level: RiskLevel, urgency: Urgency) -> Evidence:
    return Evidence(code, Effect.DEMANDS, message, level=level, urgency=urgency)

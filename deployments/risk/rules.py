"""The rules: what probabilities, patient, site, checklist, similar cases, change and the patient's record demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from deployments.risk.policy import ChecklistRule, RiskPolicy, Rules, SeverityWeights, Threshold
from serve_app.domain.assessment import (
    Change,
    Classification,
    Factor,
    Neighbours,
    QualityMeasures,
    RiskLevel,
    Urgency,
)
from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import ModelContractError
from serve_app.domain.patient import (
    AnatomSite,
    Checklist,
    ClinicalContext,
    Discrepancy,
    History,
    Lookup,
    RecordCheck,
)

LEVELS = tuple(RiskLevel)
URGENCIES = tuple(Urgency)

#: Most serious first. A rule compares the probability of its diagnosis *or a more serious one*,
#: so that probability which moves from BCC to melanoma can never take a finding away.
SERIOUSNESS = (Diagnosis.MEL, Diagnosis.SCC, Diagnosis.BCC, Diagnosis.AK, Diagnosis.UNK)

_LEAST_KNOWN = 1e-9
# A probability that misses its threshold by a rounding error has reached it.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything the other stages found; width and height of the upright original in pixels.

    `compared_level` is the risk level of the image that `change` is since.
    """

    quality: QualityMeasures
    width: int
    height: int
    classification: Classification
    neighbours: Neighbours
    context: ClinicalContext
    change: Change | None
    compared_level: RiskLevel | None = None


class Effect(StrEnum):
    """What a factor did, strongest first."""

    DEMANDS = "demands"  # a rule: the level and urgency are at least this
    RAISES = "raises"  # the score
    NONE = "none"  # weighed, and found not to matter
    NOT_AVAILABLE = "not_available"  # could not be weighed


@dataclass(frozen=True, slots=True)
class Evidence:
    """A factor with its force: the least level and urgency, and `raises` 0 to 1 for the score.

    No evidence can lower anything: a level and urgency are joined by the highest, raises by a
    product of what is left.
    """

    code: str
    effect: Effect
    message: str
    raises: float = 0.0
    level: RiskLevel = RiskLevel.LOW
    urgency: Urgency = Urgency.ROUTINE

    @property
    def factor(self) -> Factor:
        """As the answer shows it."""
        return Factor(code=self.code, effect=self.effect.value, message=self.message)


def weigh(
    findings: Findings, policy: RiskPolicy, operating_points: Mapping[str, float]
) -> Iterator[Evidence]:
    """Apply every rule; what was not stated is named, never assumed.

    Raises ModelContractError when the model lacks an operating point that the policy names.
    """
    context = findings.context
    yield from _diagnoses(findings.classification, context, policy.rules, operating_points)
    yield from _checklist(context.checklist, policy)
    yield from _age_and_site(context.age_approx, context.anatom_site_general, policy)
    yield from _history(context.history, policy)
    yield from _record(context.record)
    yield from _neighbours(findings.neighbours, policy)
    yield from _change(findings.change, policy)


def known_probabilities(classification: Classification) -> dict[Diagnosis, float]:
    """Divide the eight by 1 - p(UNK): what the calibrated softmax said, on which operating points are fitted.

    Doubt about the image must not make a melanoma look less likely than the model holds it.
    """
    known = max(1.0 - classification.probabilities[Diagnosis.UNK], _LEAST_KNOWN)
    return {d: min(p / known, 1.0) for d, p in classification.probabilities.items() if d is not Diagnosis.UNK}


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


def demands_referral(checklist: Checklist | None, rule: ChecklistRule) -> bool:
    """Whether the checklist alone, whatever the image shows, asks for an urgent referral (NICE NG12)."""
    return checklist is not None and checklist.score >= rule.refer_at


# --- What the model found


def _diagnoses(
    classification: Classification,
    context: ClinicalContext,
    rules: Rules,
    operating_points: Mapping[str, float],
) -> Iterator[Evidence]:
    known, site = known_probabilities(classification), context.anatom_site_general
    yield _melanoma(classification, rules, _limit(rules.melanoma.threshold, operating_points))
    scc, bcc, ak = rules.scc, rules.bcc, rules.ak
    bcc_urgency, bcc_because, ak_urgency, ak_because = bcc.urgency, "", ak.urgency, ""
    if site in bcc.delay_harmful_sites:
        bcc_urgency, bcc_because = bcc.delay_harmful_urgency, f"; delay may do harm at this site ({site})"
    if context.history.immunosuppression:
        ak_urgency, ak_because = ak.immunosuppressed_urgency, "; the patient is immunosuppressed"
    for diagnosis, rule, urgency, because in (
        (Diagnosis.SCC, scc, scc.urgency, ""),
        (Diagnosis.BCC, bcc, bcc_urgency, bcc_because),
        (Diagnosis.AK, ak, ak_urgency, ak_because),
    ):
        mass, limit = _or_more_serious(known, diagnosis), _limit(rule.threshold, operating_points)
        if mass + _ROUNDING >= limit:
            message = (
                f"{diagnosis.display_name} or more serious: "
                f"probability {mass:.1%} (threshold {limit:.1%}){because}."
            )
            yield _demand(diagnosis.value.lower(), message, rule.level, urgency)
    mass = _or_more_serious(classification.probabilities, Diagnosis.UNK)
    if mass + _ROUNDING >= (limit := _limit(rules.unknown.threshold, operating_points)):
        message = f"Not one of the known benign diagnoses: probability {mass:.1%} (threshold {limit:.1%})."
        yield _demand("not_benign", message, rules.unknown.level, rules.unknown.urgency)


def _limit(threshold: Threshold, operating_points: Mapping[str, float]) -> float:
    """Give a probability, looked up where the policy names an operating point."""
    if not isinstance(threshold, str):
        return threshold
    try:
        return operating_points[threshold]
    except KeyError as error:
        has = ", ".join(sorted(operating_points)) or "none"
        raise ModelContractError(
            f"The risk policy needs the operating point {threshold!r}; the model has {has}."
        ) from error


def _melanoma(classification: Classification, rules: Rules, threshold: float) -> Evidence:
    probability, plausible = known_probabilities(classification)[Diagnosis.MEL], rules.melanoma_plausible
    numbers = f"probability {probability:.1%} (threshold {threshold:.1%})"
    in_set = Diagnosis.MEL in classification.prediction_set
    if probability + _ROUNDING >= threshold:
        return _demand("melanoma", f"Melanoma: {numbers}.", rules.melanoma.level, rules.melanoma.urgency)
    if in_set or probability + _ROUNDING >= plausible.fraction * threshold:
        message = f"Melanoma is below its threshold but not excluded: {numbers}."
        return _demand("melanoma_plausible", message, plausible.level, plausible.urgency)
    return Evidence("melanoma", Effect.NONE, f"Melanoma: {numbers}.")


def _or_more_serious(probabilities: Mapping[Diagnosis, float], diagnosis: Diagnosis) -> float:
    upto = SERIOUSNESS[: SERIOUSNESS.index(diagnosis) + 1]
    return min(sum(probabilities[d] for d in upto), 1.0)


def _demand(code: str, message: str, level: RiskLevel, urgency: Urgency) -> Evidence:
    return Evidence(code, Effect.DEMANDS, message, level=level, urgency=urgency)


def _neighbours(neighbours: Neighbours, policy: RiskPolicy) -> Iterator[Evidence]:
    """The share of malignant cases among the nearest, and whether a malignant one is the nearest by far."""
    rule, raises, share = policy.rules.neighbours, policy.score.raises, neighbours.malignant_share
    if share is None:
        yield Evidence(
            "neighbours_not_available", Effect.NOT_AVAILABLE, "No similar confirmed cases were available."
        )
        return
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


def _change(change: Change | None, policy: RiskPolicy) -> Iterator[Evidence]:
    """A rise of the melanoma probability, and a changed appearance, since the lesion's last image."""
    if change is None:
        return
    rule, limit = policy.rules.change, policy.score.limits.min_similarity
    rise, similarity = change.melanoma_probability_delta, change.similarity
    if rise is not None and rise >= rule.melanoma_rise:
        message = (
            f"The melanoma probability rose by {100 * rise:.1f} percentage points since {change.since} "
            f"(threshold {100 * rule.melanoma_rise:.1f})."
        )
        yield _demand("melanoma_rise", message, rule.level, rule.urgency)
    if similarity is not None and similarity < limit:
        message = (
            f"The lesion looks different from its image of {change.since}: similarity {similarity:.2f} "
            f"(expected at least {limit:.2f})."
        )
        yield Evidence("appearance_change", Effect.RAISES, message, policy.score.raises.appearance_change)


# --- What is known of the patient


def _checklist(checklist: Checklist | None, policy: RiskPolicy) -> Iterator[Evidence]:
    if checklist is None:
        yield _missing("checklist", "The 7-point checklist was not filled in.")
        return
    rule, score = policy.rules.checklist, checklist.score
    raised = 1.0 - (1.0 - policy.score.raises.checklist_point) ** score
    if demands_referral(checklist, rule):
        message = (
            f"7-point checklist: {score} points. NICE NG12 asks for a suspected-cancer referral "
            f"from {rule.refer_at} points, whatever the image shows."
        )
        yield Evidence("checklist", Effect.DEMANDS, message, raised, rule.level, rule.urgency)
    else:
        message = (
            f"7-point checklist: {score} points, below the {rule.refer_at} for a suspected-cancer referral."
        )
        yield Evidence("checklist", Effect.RAISES if raised > 0 else Effect.NONE, message, raised)


def _age_and_site(age: int | None, site: AnatomSite | None, policy: RiskPolicy) -> Iterator[Evidence]:
    limit, raises = policy.score.limits.age, policy.score.raises
    if age is None:
        yield _missing("age", "Age was not available.")
    elif age >= limit:
        message = f"Age {age}: skin cancer is more frequent from {limit} years."
        yield Evidence("age", Effect.RAISES, message, raises.age)
    if site is None:
        yield _missing("site", "The anatomical site was not available.")
    elif site is AnatomSite.HEAD_NECK:
        message = "Head or neck: skin cancer is more frequent on sun-exposed sites."
        yield Evidence("head_neck", Effect.RAISES, message, raises.head_neck)


_HISTORY = {
    "personal_melanoma": "The patient has had a melanoma.",
    "personal_skin_cancer": "The patient has had another skin cancer.",
    "family_melanoma": "A first-degree relative has had a melanoma.",
    "immunosuppression": "The patient is immunosuppressed.",
}


def _history(history: History, policy: RiskPolicy) -> Iterator[Evidence]:
    if not history.stated:
        yield _missing("history", "History was not available.")
        return
    for name, message in _HISTORY.items():
        if getattr(history, name):
            yield Evidence(name, Effect.RAISES, message, getattr(policy.score.raises, name))
    unstated = [f.name.replace("_", " ") for f in fields(History) if getattr(history, f.name) is None]
    if unstated:
        message = f"History was not available on: {', '.join(unstated)}."
        yield Evidence("history_incomplete", Effect.NOT_AVAILABLE, message)


def _missing(what: str, message: str) -> Evidence:
    return Evidence(f"{what}_not_available", Effect.NOT_AVAILABLE, f"{message} It could not be weighed.")


# --- What the patient's record adds: each discrepancy, and each thing that it could not add, as a neutral factor

#: What a clinician calls the fields that tell one patient from another.
IDENTITY = {"age_approx": "age", "sex": "sex"}

#: What was looked up of the patient, how that ended, and the factor that says so.
_LOOKUPS = (
    (
        "patient", Lookup.NOT_AVAILABLE, "record_not_available",
        ("The patient's record in the PMS did not answer in time: history that was not sent with the image was not "
         "available. It could not be weighed."),
    ),
    (
        "patient", Lookup.UNKNOWN, "record_not_found",
        "The PMS has no record of this patient: history that was not sent with the image could not be weighed.",
    ),
    (
        "encounter", Lookup.NOT_AVAILABLE, "encounter_not_verified",
        "The PMS did not answer in time whether the encounter is this patient's.",
    ),
)  # fmt: skip


def _record(check: RecordCheck | None) -> Iterator[Evidence]:
    if check is None:
        return
    for what, ended, code, message in _LOOKUPS:
        if getattr(check, what) is ended:
            yield Evidence(code, Effect.NOT_AVAILABLE, message)
    for found in check.discrepancies:
        weighed = "The higher was weighed." if found.field == "age_approx" else "Yes was weighed."
        weighed = "It is not weighed." if found.field == "sex" else weighed
        code = f"{IDENTITY.get(found.field, 'history')}_discrepancy"
        yield Evidence(code, Effect.NONE, f"{describe_discrepancy(found)} {weighed}")


def describe_discrepancy(found: Discrepancy) -> str:
    """Both values, in a clinician's words."""
    name = IDENTITY.get(found.field) or f"history of {found.field.replace('_', ' ')}"
    return f"{name[0].upper()}{name[1:]}: {found.sent} was sent, the patient's record says {found.recorded}."

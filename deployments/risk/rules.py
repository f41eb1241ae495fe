"""The rules: what probabilities, patient, site, checklist, similar cases and the patient's record demand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum

from deployments.preprocess.preprocess import QualityMeasures
from deployments.risk.policy import ChecklistRule, Raises, RiskPolicy, Rules, SeverityWeights, Threshold
from serve_app.domain.assessment import Change, Classification, Factor, Neighbours, Reason, RiskLevel, Urgency
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


def highest_level(levels: Iterable[RiskLevel]) -> RiskLevel:
    """Give the highest, low if there is none."""
    return max(levels, key=LEVELS.index, default=RiskLevel.LOW)


def most_urgent(urgencies: Iterable[Urgency]) -> Urgency:
    """Give the most urgent, routine if there is none."""
    return max(urgencies, key=URGENCIES.index, default=Urgency.ROUTINE)


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


_HISTORY = {
    "personal_melanoma": "The patient has had a melanoma.",
    "personal_skin_cancer": "The patient has had another skin cancer.",
    "family_melanoma": "A first-degree relative has had a melanoma.",
    "immunosuppression": "The patient is immunosuppressed.",
}


def weigh_context(context: ClinicalContext, policy: RiskPolicy) -> list[Evidence]:
    """Weigh checklist, age, site and history; what was not stated is named, never assumed."""
    raises = policy.score.raises
    return [
        *_checklist(context.checklist, policy.rules.checklist, raises),
        *_age(context.age_approx, policy),
        *_site(context.anatom_site_general, raises),
        *_history(context.history, raises),
    ]


def demands_referral(checklist: Checklist | None, rule: ChecklistRule) -> bool:
    """Whether the checklist alone, whatever the image shows, asks for an urgent referral (NICE NG12)."""
    return checklist is not None and checklist.score >= rule.refer_at


def _checklist(checklist: Checklist | None, rule: ChecklistRule, raises: Raises) -> Iterator[Evidence]:
    if checklist is None:
        yield _missing("checklist", "The 7-point checklist was not filled in.")
        return
    score = checklist.score
    raised = 1.0 - (1.0 - raises.checklist_point) ** score
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


def _age(age: int | None, policy: RiskPolicy) -> Iterator[Evidence]:
    limit = policy.score.limits.age
    if age is None:
        yield _missing("age", "Age was not available.")
    elif age >= limit:
        message = f"Age {age}: skin cancer is more frequent from {limit} years."
        yield Evidence("age", Effect.RAISES, message, policy.score.raises.age)


def _site(site: AnatomSite | None, raises: Raises) -> Iterator[Evidence]:
    if site is None:
        yield _missing("site", "The anatomical site was not available.")
    elif site is AnatomSite.HEAD_NECK:
        message = "Head or neck: skin cancer is more frequent on sun-exposed sites."
        yield Evidence("head_neck", Effect.RAISES, message, raises.head_neck)


def _history(history: History, raises: Raises) -> Iterator[Evidence]:
    if not history.stated:
        yield _missing("history", "History was not available.")
        return
    for field in fields(History):
        if getattr(history, field.name):
            raised: float = getattr(raises, field.name)
            yield Evidence(field.name, Effect.RAISES, _HISTORY[field.name], raised)
    unstated = [f.name.replace("_", " ") for f in fields(History) if getattr(history, f.name) is None]
    if unstated:
        yield Evidence(
            "history_incomplete",
            Effect.NOT_AVAILABLE,
            f"History was not available on: {', '.join(unstated)}.",
        )


def _missing(what: str, message: str) -> Evidence:
    return Evidence(f"{what}_not_available", Effect.NOT_AVAILABLE, f"{message} It could not be weighed.")


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


#: What a clinician calls the fields that tell one patient from another.
_IDENTITY = {"age_approx": "age", "sex": "sex"}


def state_record(check: RecordCheck | None) -> Iterator[Evidence]:
    """Each thing that the record could not add, and each discrepancy, as a neutral factor."""
    if check is None:
        return
    if check.patient is Lookup.NOT_AVAILABLE:
        yield Evidence(
            "record_not_available",
            Effect.NOT_AVAILABLE,
            "The patient's record in the PMS did not answer in time: history that was not sent with the image "
            "was not available. It could not be weighed.",
        )
    elif check.patient is Lookup.UNKNOWN:
        yield Evidence(
            "record_not_found",
            Effect.NOT_AVAILABLE,
            "The PMS has no record of this patient: history that was not sent with the image could not be weighed.",
        )
    if check.encounter is Lookup.NOT_AVAILABLE:
        yield Evidence(
            "encounter_not_verified",
            Effect.NOT_AVAILABLE,
            "The PMS did not answer in time whether the encounter is this patient's.",
        )
    for found in check.discrepancies:
        name = _IDENTITY.get(found.field, "history")
        yield Evidence(f"{name}_discrepancy", Effect.NONE, f"{_words(found)} {_weighed(found)}")


def doubt_identity(check: RecordCheck | None) -> Iterator[Reason]:
    """A doubt when age or sex are not the record's: the image may be another patient's."""
    found = [each for each in check.discrepancies if each.field in _IDENTITY] if check else []
    if found:
        yield Reason(
            "identity_discrepancy",
            " ".join(_words(each) for each in found),
            "Make sure that image and form are this patient's before the answer is used; correct the one that is wrong.",
        )


def _words(found: Discrepancy) -> str:
    name = _IDENTITY.get(found.field) or f"history of {found.field.replace('_', ' ')}"
    return f"{name[0].upper()}{name[1:]}: {found.sent} was sent, the patient's record says {found.recorded}."


def _weighed(found: Discrepancy) -> str:
    if found.field == "sex":
        return "It is not weighed."
    return "The higher was weighed." if found.field == "age_approx" else "Yes was weighed."

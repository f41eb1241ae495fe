"""What the patient, the lesion's site and the clinician's checklist add."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from deployments.risk.evidence import Effect, Evidence
from deployments.risk.policy import RiskPolicy
from deployments.risk.policy_tables import ChecklistRule, Raises
from serve_app.domain.patient import AnatomSite, Checklist, ClinicalContext, History

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

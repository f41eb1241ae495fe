"""Cards of CDS Hooks 2.0: what a lesion waits for, in words. Nothing here is null or empty, as the specification asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, UUID, uuid5

from serve_app.domain.assessment import Urgency
from serve_app.domain.review import CardKind, OverrideReason
from serve_app.records.hooks import Due
from serve_app.settings import HookClient

#: The code system of this service's own override reasons.
REASONS = "urn:derm-cds:override-reason"
#: More than anyone reads at the opening of a record; what is left over is counted on one more card.
MAX_CARDS = 20
DISCLAIMER = "Decision support, not a diagnosis."
_SOURCE = "Dermoscopy decision support, not a diagnosis"
#: An overdue follow-up is never below a warning: it is late already.
_INDICATORS = {Urgency.ROUTINE: "info", Urgency.EXPEDITED: "warning", Urgency.URGENT: "critical"}
_CODES = [
    {"system": REASONS, "code": reason.value, "display": reason.value.replace("_", " ").capitalize()}
    for reason in OverrideReason
]

Card = dict[str, Any]


def card_id(client: str, due: Due) -> UUID:
    """The same whenever this is shown to this EHR, so that late or repeated feedback finds what it is about."""
    return uuid5(NAMESPACE_URL, f"urn:derm-cds:card:{client}:{due.kind}:{due.review_id or due.assessment_id}")


def write_cards(
    client: str, settings: HookClient, found: Sequence[Due], *, source_url: str | None
) -> list[Card]:
    """Write a card for each of the first MAX_CARDS, and one that counts the rest."""
    source = {"label": _SOURCE, **({"url": source_url} if source_url else {})}
    cards = [
        {"uuid": str(card_id(client, due)), **_card(due, settings), "source": source}
        for due in found[:MAX_CARDS]
    ]
    if rest := found[MAX_CARDS:]:
        lesions = len({due.lesion_id for due in rest})
        cards.append(
            {
                "summary": f"{len(rest)} more open demands and overdue follow-ups, of {lesions} lesions",
                "detail": f"They are less pressing than those shown; the worklist has them all.\n\n{DISCLAIMER}",
                "indicator": max((_indicator(due) for due in rest), key=list(_INDICATORS.values()).index),
                "source": source,
            }
        )
    return cards


def _indicator(due: Due) -> str:
    urgency = due.urgency or Urgency.ROUTINE
    if due.kind is CardKind.FOLLOW_UP and urgency is Urgency.ROUTINE:
        urgency = Urgency.EXPEDITED
    return _INDICATORS[urgency]


def _card(due: Due, settings: HookClient) -> Card:
    site = f" ({due.site})" if due.site else ""
    risk = f"{due.level} risk, urgency {due.urgency}"
    image = f"Image: `{due.image_id}`{', since erased; what it demanded stands' if due.erased else ''}"
    lesion = f"Lesion: `{due.lesion_id}`{f', {due.site}' if due.site else ''}"
    if due.kind is CardKind.FOLLOW_UP:
        summary = f"Follow-up overdue since {due.follow_up_by}{site}"
        lines = [
            "Shown is a **decision**: a clinician set this follow-up, and no image of the lesion and no outcome came since.",
            f"- Due: **{due.follow_up_by}**, set on {due.since:%Y-%m-%d}",
            f"- Decided: {risk}" if due.level and due.urgency else "- Decided: no level or urgency on record",
            "- What is asked for: to see the lesion again, with a new image",
        ]
    else:
        summary = f"Open demand: {risk}, unanswered since {due.since:%Y-%m-%d}{site}"
        lines = [
            "Shown is the **open demand**: the highest that this lesion's images demand, and no clinician has answered.",
            f"- Level: **{due.level}**; urgency: **{due.urgency}**",
            f"- Since: {due.since:%Y-%m-%d %H:%M} UTC",
            f"- What is demanded: a clinician's {'' if due.erased else 'review of this image, and a '}decision on referral",
        ]
    lines += [f"- {image}", f"- {lesion}"]
    closing = (
        f"{DISCLAIMER} Dismissing this card, for whatever reason, is recorded beside it and closes nothing."
    )
    card: Card = {
        "summary": summary,
        "detail": f"{lines[0]}\n\n" + "\n".join(lines[1:]) + f"\n\n{closing}",
        "indicator": _indicator(due),
        "overrideReasons": _CODES,
    }
    if settings.encounter_page and due.encounter_id:
        page = settings.encounter_page.replace("{encounter_id}", quote(due.encounter_id, safe=""))
        card["links"] = [{"label": "The encounter of this image", "url": page, "type": "absolute"}]
    return card

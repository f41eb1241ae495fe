"""What a card says: whole, short, and nothing empty."""

from __future__ import annotations

from datetime import UTC, date, datetime
from itertools import product
import json
from typing import Any
from uuid import uuid4

import jsonschema

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite
from serve_app.domain.review import CardKind
from serve_app.hooks.cards import MAX_CARDS, write_cards
from serve_app.records.hooks import Due
from serve_app.settings import HookClient

_TEXT = {"type": "string", "minLength": 1}
_URL = {"type": "string", "pattern": "^https://"}
_CODING = {
    "type": "object",
    "required": ["code", "system", "display"],
    "properties": {"code": _TEXT, "system": _TEXT, "display": _TEXT},
    "additionalProperties": False,
}
#: As CDS Hooks 2.0 has it, of what this service uses; the summary is shorter than 140 characters.
CARDS = {
    "type": "object",
    "required": ["cards"],
    "additionalProperties": False,
    "properties": {
        "cards": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["summary", "indicator", "source"],
                "additionalProperties": False,
                "properties": {
                    "uuid": {"type": "string", "format": "uuid"},
                    "summary": {**_TEXT, "maxLength": 139},
                    "detail": _TEXT,
                    "indicator": {"enum": ["info", "warning", "critical"]},
                    "source": {
                        "type": "object",
                        "required": ["label"],
                        "properties": {"label": _TEXT, "url": _URL},
                        "additionalProperties": False,
                    },
                    "overrideReasons": {"type": "array", "minItems": 1, "items": _CODING},
                    "links": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["label", "url", "type"],
                            "properties": {"label": _TEXT, "url": _URL, "type": {"const": "absolute"}},
                            "additionalProperties": False,
                        },
                    },
                },
            },
        }
    },
}


async def cards_of(response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    jsonschema.validate(response.json(), CARDS)
    found: list[dict[str, Any]] = response.json()["cards"]
    return found


CLIENT = HookClient(issuer="i", jwks="k", encounter_page="https://w.example/{encounter_id}")


def due(**changed: Any) -> Due:
    return Due(
        **{
            "kind": CardKind.OPEN_DEMAND,
            "lesion_id": uuid4(),
            "image_id": uuid4(),
            "assessment_id": uuid4(),
            "review_id": None,
            "level": RiskLevel.HIGH,
            "urgency": Urgency.URGENT,
            "since": datetime(2026, 11, 20, 14, 3, tzinfo=UTC),
            "follow_up_by": None,
            "site": None,
            "encounter_id": None,
            "erased": False,
        }
        | changed
    )


def test_every_card_is_whole_and_short() -> None:
    follow_up = {"kind": CardKind.FOLLOW_UP, "review_id": uuid4(), "follow_up_by": date(2026, 11, 20)}
    found = [
        due(level=level, urgency=urgency, site=site, erased=erased, encounter_id=encounter, **kind)
        for level, urgency, site, erased, encounter, kind in product(
            [*RiskLevel, None],
            [*Urgency, None],
            [*AnatomSite, None],
            (True, False),
            ("e/1?", None),
            ({}, follow_up),
        )
        if kind or (level and urgency)
    ]
    cards = [write_cards("west", CLIENT, [each], source_url=None)[0] for each in found]
    jsonschema.validate({"cards": cards}, CARDS)
    for each, card in zip(found, map(json.dumps, cards), strict=True):
        assert "None" not in card
        assert ("https://w.example/e%2F1%3F" in card) is (each.encounter_id is not None)
    indicators = {
        urgency: write_cards("w", CLIENT, [due(urgency=urgency)], source_url=None)[0] for urgency in Urgency
    }
    assert [indicators[urgency]["indicator"] for urgency in Urgency] == ["info", "warning", "critical"]


def test_what_is_not_shown_is_counted_with_its_urgency() -> None:
    found = [due() for _ in range(MAX_CARDS + 2)] + [due(urgency=Urgency.ROUTINE)]
    *cards, rest = write_cards("west", CLIENT, found, source_url="https://a.example")
    jsonschema.validate({"cards": [*cards, rest]}, CARDS)
    assert len(cards) == MAX_CARDS
    assert rest["summary"] == "3 more open demands and overdue follow-ups, of 3 lesions"
    assert rest["indicator"] == "critical"
    assert "uuid" not in rest

"""Which cards an EHR is given and for whom, what they say, and what becomes of them."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import product
import json
import logging
from typing import Any
from uuid import uuid4

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jsonschema
import pytest

from serve_app.domain.assessment import RiskLevel, Urgency
from serve_app.domain.patient import AnatomSite
from serve_app.domain.review import CardKind, OverrideReason
from serve_app.hooks.cards import MAX_CARDS, REASONS, write_cards
from serve_app.hooks.service import SERVICE_PATH
from serve_app.records.access import AccessStore
from serve_app.records.hooks import Due, HookStore
from serve_app.records.reconciliation import reconcile
from serve_app.settings import HookClient
from tests.serve_app.erasure.erasing import erase
from tests.serve_app.hooks.conftest import DOCTOR, USER, overridden, view
from tests.serve_app.http.test_access import operators
from tests.serve_app.http.test_fuzz import json_values

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


async def test_an_open_demand_is_a_card_and_a_read_on_record(west, east, lesion) -> None:
    await west.service.owner.execute(
        "UPDATE assessments SET demand_level = 'high', demand_urgency = 'urgent' WHERE image_id = $1::text::uuid",
        lesion["image_id"],
    )
    response = await west.look(lesion["fhir"])
    assert response.headers["cache-control"] == "no-store"
    (card,) = await cards_of(response)
    since = lesion["created_at"][:10]
    assert (
        card["summary"]
        == f"Open demand: high risk, urgency urgent, unanswered since {since} (posterior torso)"
    )
    assert card["indicator"] == "critical"
    for said in (
        "**open demand**",
        "not a diagnosis",
        "review",
        lesion["image_id"],
        lesion["lesion_id"],
        "closes nothing",
    ):
        assert said in card["detail"]
    assert "diagnosis" in card["source"]["label"]
    assert card["source"]["url"] == "https://intranet.hospital.example/derm"
    assert [link["url"] for link in card["links"]] == ["https://west.example/encounters/e-1"]
    assert {(each["system"], each["code"]) for each in card["overrideReasons"]} == {
        (REASONS, reason) for reason in OverrideReason
    }
    event = await west.service.hold_to_event(response, "read", "success")
    assert (event["actor"], event["patient_id"], event["purpose"]) == (DOCTOR, lesion["patient_id"], "TREAT")
    instance = event["detail"].pop("hook_instance")
    assert instance
    told = {"hook": "patient-view", "client": "west", "user": USER, "patient": lesion["fhir"]}
    assert event["detail"] == told
    # The same card each time, and another one in another EHR.
    (again,) = await cards_of(await west.look(lesion["fhir"]))
    (elsewhere,) = await cards_of(await east.look(lesion["patient_id"]))
    assert again["uuid"] == card["uuid"] != elsewhere["uuid"]


async def test_ids_that_are_the_same_in_both_systems_need_no_map(east, lesion) -> None:
    (card,) = await cards_of(await east.look(lesion["patient_id"]))
    assert "links" not in card


async def test_whoever_may_not_read_gets_what_one_without_demands_gets(west, lesion) -> None:
    """Byte for byte, whatever the reason; each is one denied read of the clinician, or of the EHR where none is known."""
    hooked, owner = west.service, west.service.owner
    others = f"dr-{uuid4().hex[:8]}"
    revoked, ended = f"dr-{uuid4().hex[:8]}", f"dr-{uuid4().hex[:8]}"
    for number, subject in enumerate((others, revoked, ended)):
        await west.map(user=(f"Practitioner/{subject}", subject))
        if number:
            await hooked.care(subject, lesion["patient_id"])
    await AccessStore(owner).revoke("subject", revoked, by="operator", event=operators("revoke"))
    await owner.execute(
        "UPDATE care_assignments SET ends_at = now() - interval '1 s' WHERE clinician = $1", ended
    )
    empty = await hooked.care(DOCTOR)
    await west.map(patient=(f"empty-{lesion['fhir']}", empty))
    cases = {
        "assignment": (f"Practitioner/{others}", lesion["fhir"], others),
        "revoked": (f"Practitioner/{revoked}", lesion["fhir"], revoked),
        "assignment ": (f"Practitioner/{ended}", lesion["fhir"], ended),
        "unknown_user": ("Practitioner/nobody", lesion["fhir"], "derm-cds:hooks:west"),
        "unknown_user ": ("PractitionerRole/17", lesion["fhir"], "derm-cds:hooks:west"),
        "unknown_patient": (USER, "no-such-patient", DOCTOR),
        "unknown_patient ": (USER, lesion["patient_id"], DOCTOR),
    }
    allowed = await west.look(f"empty-{lesion['fhir']}")
    await hooked.hold_to_event(allowed, "read", "success")
    for reason, (user, patient, actor) in cases.items():
        shown = await owner.fetchval("SELECT count(*) FROM hook_cards")
        async with hooked.storing_nothing():
            response = await west.look(patient, user=user)
        assert response.content == allowed.content == b'{"cards":[]}'
        own = {"x-request-id"}
        assert {k: v for k, v in response.headers.items() if k not in own} == {
            k: v for k, v in allowed.headers.items() if k not in own
        }
        event = await hooked.hold_to_event(response, "read", "denied")
        assert (event["actor"], event["detail"]["reason"]) == (actor, reason.strip())
        assert (event["detail"]["user"], event["detail"]["patient"]) == (user, patient)
        assert await owner.fetchval("SELECT count(*) FROM hook_cards") == shown


async def test_a_map_is_one_ehrs_and_its_end_counts_at_once(west, east, lesion) -> None:
    assert await cards_of(await east.look(lesion["fhir"])) == []
    assert await cards_of(await west.look(lesion["fhir"]))
    store = HookStore(west.service.owner)
    assert (await store.unmap("west", "patient", lesion["fhir"])).own_id == lesion["patient_id"]
    assert await store.unmap("west", "patient", lesion["fhir"]) is None
    assert await cards_of(await west.look(lesion["fhir"])) == []


async def test_an_emergency_access_counts_and_is_on_record(west, lesion) -> None:
    subject = f"dr-{uuid4().hex[:8]}"
    await west.map(user=(f"Practitioner/{subject}", subject))
    body = {"patient_id": lesion["patient_id"], "reason": "unconscious in casualty"}
    opened = await west.service.client.post(
        "/api/emergency-access", json=body, headers=west.service.token(subject)
    )
    response = await west.look(lesion["fhir"], user=f"Practitioner/{subject}")
    assert await cards_of(response)
    event = await west.service.hold_to_event(response, "read", "success")
    assert event["detail"]["emergency_access"] == opened.json()["emergency_id"]
    assert event["purpose"] == "ETREAT"


async def test_an_erased_image_still_demands_and_shows_nothing_of_itself(west, lesion) -> None:
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    told = await west.tell(overridden(card["uuid"], userComment="a mole like a map of Norway"))
    assert told.status_code == 200
    assert (await erase(west.service, lesion)).status_code == 200
    (after,) = await cards_of(await west.look(lesion["fhir"]))
    assert after["uuid"] == card["uuid"]
    assert "since erased" in after["detail"]
    assert "torso" not in json.dumps(after)
    assert (await west.tell(overridden(card["uuid"], userComment="another word of it"))).status_code == 200
    kept = await west.service.owner.fetch(
        "SELECT comment, outcome FROM hook_feedback WHERE card_id = $1::text::uuid", card["uuid"]
    )
    assert [tuple(row) for row in kept] == [(None, "overridden")] * 2


async def review(service, answer, *, follow_up_by: date, days_ago: int = 0) -> None:
    await service.owner.execute(
        "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, recorded_at, decision, level, urgency,"
        " follow_up_by) VALUES ($1, $2::text::uuid, 'dr', 'r', now() - make_interval(days => $3), 'accept', 'low',"
        " 'routine', $4)",
        uuid4(),
        answer["assessment_id"],
        days_ago,
        follow_up_by,
    )
    await service.owner.execute(
        "UPDATE assessments SET demand_answered_at = now() WHERE assessment_id = $1::text::uuid",
        answer["assessment_id"],
    )


async def test_a_follow_up_is_due_once_it_is_past_until_the_lesion_is_seen(west, lesion) -> None:
    hooked, today = west.service, datetime.now(UTC).date()
    await hooked.owner.execute(
        "UPDATE lesion_images SET created_at = now() - interval '100 days' WHERE image_id = $1::text::uuid",
        lesion["image_id"],
    )
    await review(hooked, lesion, follow_up_by=today, days_ago=90)
    assert await cards_of(await west.look(lesion["fhir"])) == []
    yesterday = today - timedelta(days=1)
    await review(hooked, lesion, follow_up_by=yesterday, days_ago=80)
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    assert card["summary"] == f"Follow-up overdue since {yesterday} (posterior torso)"
    assert card["indicator"] == "warning"
    assert "**decision**" in card["detail"]
    # A later word of a clinician counts instead.
    await review(hooked, lesion, follow_up_by=today + timedelta(days=30), days_ago=70)
    assert await cards_of(await west.look(lesion["fhir"])) == []
    await review(hooked, lesion, follow_up_by=yesterday, days_ago=60)
    seen = (await hooked.upload(lesion["patient_id"], subject=DOCTOR, lesion_id=lesion["lesion_id"])).json()
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    assert card["summary"].startswith("Open demand")
    # An image that was none of it has not been seen.
    await erase(hooked, seen)
    assert len(await cards_of(await west.look(lesion["fhir"]))) == 2


async def test_feedback_is_recorded_once_and_closes_nothing(west, lesion) -> None:
    hooked = west.service
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    reason = {"reason": {"system": REASONS, "code": "known_lesion"}, "userComment": "known for years"}
    told = overridden(card["uuid"], **reason)
    first, again = await west.tell(told), await west.tell(told)
    assert (first.status_code, first.content, again.status_code) == (200, b"", 200)
    event = await hooked.hold_to_event(first, "hook_feedback", "success")
    assert [str(event[name]) for name in ("patient_id", "lesion_id", "assessment_id")] == [
        lesion[name] for name in ("patient_id", "lesion_id", "assessment_id")
    ]
    assert (event["actor"], event["purpose"]) == ("derm-cds:hooks:west", "TREAT")
    assert "known for years" not in json.dumps(event["detail"])
    assert len(event["rows"]["hook_feedback"]) == 1
    assert (await hooked.hold_to_event(again, "hook_feedback", "success"))["detail"]["feedback"] == []
    # A later word adds to it; the card is shown as before, and the timeline tells both.
    assert (await west.tell({**told, "outcome": "accepted"})).status_code == 200
    assert [each["uuid"] for each in await cards_of(await west.look(lesion["fhir"]))] == [card["uuid"]]
    timeline = (
        await hooked.client.get(f"/api/lesions/{lesion['lesion_id']}", headers=hooked.token(DOCTOR))
    ).json()
    assert timeline["open_demand"]["assessment_id"] == lesion["assessment_id"]
    found = timeline["hook_feedback"]
    assert [(each["outcome"], each["reason_code"], each["comment"]) for each in found] == [
        ("overridden", "known_lesion", "known for years"),
        ("accepted", "known_lesion", "known for years"),
    ]
    assert {(each["assessment_id"], each["client"]) for each in found} == {(lesion["assessment_id"], "west")}


async def test_feedback_is_for_cards_that_this_ehr_was_given(west, east, lesion) -> None:
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    for ehr, cards in ((east, [card["uuid"]]), (west, [str(uuid4())]), (west, [card["uuid"], str(uuid4())])):
        rows = await west.service.owner.fetchval("SELECT count(*) FROM hook_feedback")
        response = await ehr.tell(*map(overridden, cards))
        await west.service.hold_to_failure(response, 404, "not_found", "hook_feedback")
        assert await west.service.owner.fetchval("SELECT count(*) FROM hook_feedback") == rows


async def test_feedback_of_several_patients_is_an_event_for_each(west, lesion) -> None:
    another = await west.service.upload(await west.service.care(DOCTOR), subject=DOCTOR)
    await west.map(patient=(f"b-{lesion['fhir']}", another.json()["patient_id"]))
    cards = [
        (await cards_of(await west.look(f"{before}{lesion['fhir']}")))[0]["uuid"] for before in ("", "b-")
    ]
    response = await west.tell(*map(overridden, cards))
    assert response.status_code == 200
    events = await west.service.events(response)
    assert {event["patient_id"] for event in events} == {lesion["patient_id"], another.json()["patient_id"]}


@pytest.mark.parametrize(
    "changed",
    [
        {"feedback": []},
        {"feedback": [{}] * 101},
        {"feedback": [overridden("no-uuid")]},
        {"feedback": [overridden(str(uuid4())) | {"outcome": "ignored"}]},
        {"feedback": [overridden(str(uuid4())) | {"outcomeTimestamp": "2026-11-27T10:00:00"}]},
        {"feedback": [overridden(str(uuid4()), reason={"system": REASONS, "code": "bored"})]},
        {"feedback": [overridden(str(uuid4()), userComment="x" * 4001)]},
    ],
    ids=["none", "many", "card", "outcome", "zone", "reason", "comment"],
)
async def test_feedback_that_is_none_is_refused(west, changed) -> None:
    response = await west.post(changed, f"{SERVICE_PATH}/feedback")
    west.service.hold_to_problem(response, 400, "invalid_field")


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in view("p").items() if key != name}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (view("p") | {"hook": "order-sign"}, 400, "invalid_field"),
        (without("hook"), 400, "invalid_field"),
        (without("context"), 400, "invalid_field"),
        (without("hookInstance"), 400, "invalid_field"),
        (view("p") | {"hookInstance": "1"}, 400, "invalid_field"),
        (view("p") | {"context": {"userId": USER}}, 400, "invalid_field"),
        (view("p", "17"), 400, "invalid_field"),
        (view("p", "Practitioner/Erika Mustermann"), 400, "invalid_field"),
        (view("Erika Mustermann"), 400, "invalid_field"),
        (view("p\x00"), 400, "invalid_field"),
        (b"", 400, "invalid_field"),
        (b"{", 400, "invalid_field"),
        (b"[]", 400, "invalid_field"),
        (b'{"hook": "patient-view", "hook": "patient-view"}', 400, "invalid_field"),
        (b"[" * 60_000, 400, "invalid_field"),
        (view("p") | {"prefetch": {"a": "x" * 70_000}}, 413, "too_large"),
    ],
    ids=lambda value: None if isinstance(value, int | str) else "",
)
async def test_a_body_that_is_none_is_refused_and_quoted_nowhere(west, body, status, code) -> None:
    async with west.service.storing_nothing():
        response = await west.post(body)
    found = west.service.hold_to_problem(response, status, code)
    assert "Mustermann" not in json.dumps(found)
    event = await west.service.hold_to_event(response, "read", "failed", code=code)
    assert (event["actor"], event["patient_id"]) == ("derm-cds:hooks:west", None)


async def test_no_log_has_patient_user_token_or_comment(west, lesion, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = [west.token(), west.token(iss="https://evil.example")]
    (card,) = await cards_of(await west.look(lesion["fhir"], token=tokens[0]))
    await west.look(lesion["fhir"], token=tokens[0])
    await west.look(lesion["fhir"], token=tokens[1])
    await west.post(view("Zyxmuster Hans"))
    await west.tell(overridden(card["uuid"], userComment="a word of Zyxmuster"))
    said = "".join(f"{each.getMessage()} {vars(each)!r}" for each in caplog.records)
    assert said
    marks = (lesion["fhir"], lesion["patient_id"], "Practitioner", "Zyxmuster", "opaque-token", DOCTOR)
    assert not [mark for mark in (*marks, *(token.split(".")[2] for token in tokens)) if mark in said]


_WHOLE = st.fixed_dictionaries(
    {},
    optional={
        "hook": st.just("patient-view") | json_values,
        "hookInstance": st.uuids().map(str) | json_values,
        "context": json_values
        | st.fixed_dictionaries(
            {
                "userId": st.just(USER) | st.text(max_size=40) | json_values,
                "patientId": st.text(max_size=80) | json_values,
            }
        ),
        "feedback": json_values | st.lists(json_values, max_size=3),
    },
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    body=_WHOLE | json_values | st.binary(max_size=200),
    path=st.sampled_from([SERVICE_PATH, f"{SERVICE_PATH}/feedback"]),
)
async def test_whatever_is_sent_is_no_failure_of_the_service(west, body, path) -> None:
    response = await west.post(body, path)
    if response.status_code == 200:
        assert response.json() == {"cards": []}
    else:
        west.service.hold_to_problem(response, response.status_code, response.json()["code"])
        assert response.status_code in {400, 404, 413}


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


async def test_the_log_vouches_for_the_map_and_for_feedback(west, lesion) -> None:
    hooked = west.service
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    await west.tell(overridden(card["uuid"], userComment="goes with the image"))
    pool = hooked.app.state.services.pool

    async def differ() -> set[tuple[str, str]]:
        found = await reconcile(pool)
        return {(each.table, each.what) for each in found.differences if each.table.startswith("hook_")}

    assert await differ() == set()
    change = "UPDATE hook_identities SET own_id = $2 WHERE client = 'west' AND fhir_id = $1"
    await hooked.owner.execute(change, lesion["fhir"], "another")
    await hooked.owner.execute(
        "INSERT INTO hook_identities VALUES ('west', 'user', 'Practitioner/x', $1, now(), 'me')", DOCTOR
    )
    assert await differ() == {
        ("hook_identities", "is not what its event says"),
        ("hook_identities", "is in no event"),
    }
    await hooked.owner.execute(change, lesion["fhir"], lesion["patient_id"])
    await hooked.owner.execute("DELETE FROM hook_identities WHERE fhir_id = 'Practitioner/x'")
    assert await differ() == set()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM hook_feedback",
        "TRUNCATE hook_feedback",
        "UPDATE hook_feedback SET outcome = 'accepted'",
        "UPDATE hook_feedback SET comment = 'another'",
    ],
)
async def test_feedback_is_only_added_to(west, lesion, statement) -> None:
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    await west.tell(overridden(card["uuid"], userComment="a word"))
    for pool in (west.service.owner, west.service.app.state.services.pool):
        async with pool._pool.acquire() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)

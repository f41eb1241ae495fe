"""Which cards an EHR is given, and for whom; what it may send, and what the log says of it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
import json
import logging
from typing import Any
from uuid import uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from serve_app.domain.review import OverrideReason
from serve_app.hooks.cards import REASONS
from serve_app.hooks.service import SERVICE_PATH
from serve_app.records.access import AccessStore
from serve_app.records.hooks import HookStore
from tests.serve_app.erasure.erasing import erase
from tests.serve_app.hooks.conftest import DOCTOR, USER, overridden, view
from tests.serve_app.hooks.test_cards import cards_of
from tests.serve_app.http.test_access import operators
from tests.serve_app.http.test_fuzz import json_values


async def test_an_open_demand_is_a_card_and_a_read_on_record(west, east, lesion) -> None:
    level, urgency = (lesion["open_demand"][name] for name in ("level", "urgency"))
    response = await west.look(lesion["fhir"])
    assert response.headers["cache-control"] == "no-store"
    (card,) = await cards_of(response)
    since = lesion["created_at"][:10]
    assert (
        card["summary"]
        == f"Open demand: {level} risk, urgency {urgency}, unanswered since {since} (posterior torso)"
    )
    assert card["indicator"] == {"expedited": "warning", "urgent": "critical"}[urgency]
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


async def test_whoever_saw_the_card_has_been_given_the_answer(west, lesion) -> None:
    """What they think of the lesion after that does not count as thought before."""
    hooked, said = west.service, {}
    for looks in (True, False):
        subject = f"dr-{uuid4().hex[:8]}"
        await hooked.care(subject, lesion["patient_id"])
        await west.map(user=(f"Practitioner/{subject}", subject))
        if looks:
            assert await cards_of(await west.look(lesion["fhir"], user=f"Practitioner/{subject}"))
        body = {"assessment_id": lesion["assessment_id"], "impression": {"diagnosis": "NV"}}
        url = f"/api/lesions/{lesion['lesion_id']}/reviews"
        response = await hooked.client.post(url, json=body, headers=hooked.token(subject))
        said[looks] = response.json()["review"]["impression"]["before_answer"]
    assert said == {True: False, False: True}


async def test_a_clinicians_review_closes_the_card_and_feedback_does_not(west, lesion) -> None:
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    await west.tell(overridden(card["uuid"], reason={"system": REASONS, "code": "known_lesion"}))
    assert await cards_of(await west.look(lesion["fhir"]))
    decided = await west.service.client.post(
        f"/api/lesions/{lesion['lesion_id']}/reviews",
        json={"assessment_id": lesion["assessment_id"], "decision": "accept"},
        headers=west.service.token(DOCTOR),
    )
    assert decided.status_code == 201, decided.text
    assert await cards_of(await west.look(lesion["fhir"])) == []
    # Late feedback finds its card.
    assert (await west.tell(overridden(card["uuid"]))).status_code == 200


async def test_an_erased_image_still_demands_and_shows_nothing_of_itself(west, lesion) -> None:
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    told = await west.tell(overridden(card["uuid"], userComment="a mole like a map of Norway"))
    assert told.status_code == 200
    assert (await erase(west.service, lesion)).status_code == 200
    (after,) = await cards_of(await west.look(lesion["fhir"]))
    assert after["uuid"] == card["uuid"]
    assert "since erased" in after["detail"]
    assert "What is demanded: a clinician's decision on referral" in after["detail"]
    assert "torso" not in json.dumps(after)
    assert (await west.tell(overridden(card["uuid"], userComment="another word of it"))).status_code == 200
    kept = await west.service.owner.fetch(
        "SELECT comment, outcome FROM hook_feedback WHERE card_id = $1::text::uuid", card["uuid"]
    )
    assert [tuple(row) for row in kept] == [(None, "overridden")] * 2


async def review(service, answer, *, follow_up_by: date, days_ago: int = 0) -> None:
    await service.owner.execute(
        "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, recorded_at, decision, level, urgency,"
        " follow_up_by, answers) VALUES ($1, $2::text::uuid, 'dr', 'r', now() - make_interval(days => $3), 'accept', 'low',"
        " 'routine', $4, ARRAY[$2::text::uuid])",
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
    await hooked.owner.execute(
        "INSERT INTO lesion_outcomes (outcome_id, lesion_id, kind, malignant, observed_on, source, recorded_by, request_id)"
        " VALUES ($1, $2::text::uuid, 'follow_up', false, $3, 'clinician', 'dr', 'r')",
        uuid4(),
        lesion["lesion_id"],
        today,
    )
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    assert card["summary"].startswith("Open demand")


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
    logging.getLogger("derm.test").debug("it begins")
    tokens = [west.token(), west.token(iss="https://evil.example")]
    (card,) = await cards_of(await west.look(lesion["fhir"], token=tokens[0]))
    await west.look(lesion["fhir"], token=tokens[0])
    await west.look(lesion["fhir"], token=tokens[1])
    await west.post(view("Zyxmuster Hans"))
    await west.tell(overridden(card["uuid"], userComment="a word of Zyxmuster"))
    said = "".join(f"{each.getMessage()} {vars(each)!r}" for each in caplog.records)
    assert "it begins" in said
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

"""What became of cards: recorded beside them, for the EHR that was given them, and closing nothing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
import json
from uuid import UUID, uuid4

import asyncpg
import pytest

from serve_app.hooks.cards import REASONS
from serve_app.hooks.service import SERVICE_PATH
from serve_app.records.pool import queries
from serve_app.records.reconciliation import reconcile
from tests.serve_app.erasure.erasing import erase
from tests.serve_app.hooks.conftest import DOCTOR, overridden
from tests.serve_app.hooks.test_cards import cards_of


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
        {"feedback": [overridden(str(uuid4()), userComment="a\0b")]},
        {"feedback": [overridden(str(uuid4()), userComment="\x1b[31m")]},
        {"feedback": [overridden(str(uuid4()), reason={"code": "a\0"})]},
        {"feedback": [overridden(str(uuid4()), reason={"system": "x\0", "code": "a"})]},
        {"feedback": [overridden(str(uuid4())) | {"outcomeTimestamp": "0001-01-01T00:00:00Z"}]},
        {"feedback": [overridden(str(uuid4())) | {"outcomeTimestamp": "0001-01-01T00:00:00+14:00"}]},
        {"feedback": [overridden(str(uuid4())) | {"outcomeTimestamp": "9999-12-31T23:59:59-14:00"}]},
    ],
    ids=[
        *("none", "many", "card", "outcome", "zone", "reason", "comment", "NUL", "escape", "code", "system"),
        *("first year", "before it", "last year"),
    ],
)
async def test_feedback_that_is_none_is_refused(west, changed) -> None:
    response = await west.post(changed, f"{SERVICE_PATH}/feedback")
    west.service.hold_to_problem(response, 400, "invalid_field")


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


@pytest.mark.parametrize("first", ["feedback", "erasure"])
async def test_of_a_comment_and_an_erasure_at_once_none_is_left(west, lesion, first) -> None:
    """Whichever is not yet committed, the other waits for it, and then knows of it."""
    (card,) = await cards_of(await west.look(lesion["fhir"]))
    given = overridden(card["uuid"], userComment="a word of the image")
    ids = [UUID(lesion[name]) for name in ("lesion_id", "image_id")]
    async with west.service.owner.connection() as connection:
        async with connection.transaction():
            if first == "feedback":
                values = ("overridden", None, None, "a word of the image", datetime.now(UTC))
                await connection.execute(
                    queries("hooks")["add_feedback"], uuid4(), UUID(card["uuid"]), *values
                )
                second = asyncio.create_task(erase(west.service, lesion))
            else:
                statement = "SELECT erase_image($1, $2, $3, 'patient_request', NULL, 'chief', 'r')"
                assert await connection.fetchval(statement, *ids, uuid4()) == "accepted"
                second = asyncio.create_task(west.tell(given))
            await asyncio.sleep(0.3)
            assert not second.done()
        assert (await second).status_code == 200
        rows = await connection.fetch(
            "SELECT comment FROM hook_feedback WHERE card_id = $1", UUID(card["uuid"])
        )
    assert [row["comment"] for row in rows] == [None]

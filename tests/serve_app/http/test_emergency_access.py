"""Breaking the glass, and who judges it."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import uuid4

import asyncpg
import httpx
import pytest

REASON = "unconscious in casualty, dermatologist on call"


async def break_glass(service, subject: str, patient: str, **changed: object) -> httpx.Response:
    return await service.client.post(
        "/api/emergency-access",
        json={"patient_id": patient, "reason": REASON, **changed},
        headers=service.token(subject),
    )


async def review(service, emergency_id: str, subject: str, **changed: object) -> httpx.Response:
    return await service.client.post(
        f"/api/emergency-access/{emergency_id}/review",
        json={"outcome": "justified", **changed},
        headers=service.token(subject, ("supervisor",)),
    )


async def queue(service, *, reviewed: bool = False) -> list[dict]:
    found, after = [], None
    while True:
        params = {"reviewed": reviewed, "limit": 2, **({"after": after} if after else {})}
        headers = service.token("auditor", ("auditor",))
        answer = await service.client.get("/api/emergency-access", params=params, headers=headers)
        assert answer.status_code == 200, answer.text
        service.hold_to("EmergencyQueueDocument", answer.json())
        found += answer.json()["emergency_accesses"]
        after = answer.json()["next"]
        if after is None:
            return found


async def test_from_the_emergency_to_its_review(service) -> None:
    patient = await service.care("dr-owner")
    lesion = (await service.upload(patient, subject="dr-owner")).json()["lesion_id"]
    subject = f"dr-{uuid4().hex[:8]}"
    headers = service.token(subject)
    assert (await service.client.get(f"/api/lesions/{lesion}", headers=headers)).status_code == 403
    opened = await break_glass(service, subject, patient)
    assert opened.status_code == 201, opened.text
    service.hold_to("EmergencyAccessDocument", opened.json())
    emergency_id = opened.json()["emergency_id"]
    detail = {"emergency_access": emergency_id, "minutes": 240}
    event = await service.hold_to_event(opened, "break_glass", "success", **detail)
    assert event["patient_id"] == patient
    starts, ends = (datetime.fromisoformat(opened.json()[name]) for name in ("starts_at", "ends_at"))
    assert abs(ends - starts - timedelta(hours=4)) < timedelta(seconds=2)

    for _ in range(2):
        answer = await service.client.get(f"/api/lesions/{lesion}", headers=headers)
        assert answer.status_code == 200
        await service.hold_to_event(answer, "read", "success", emergency_access=emergency_id)
    uploaded = await service.upload(patient, subject=subject, lesion_id=lesion)
    assert uploaded.status_code == 201
    events = await service.events(uploaded)
    assert {event["action"] for event in events} == {"upload", "classify"}
    assert all(event["detail"]["emergency_access"] == emergency_id for event in events)

    (waiting,) = [access for access in await queue(service) if access["emergency_id"] == emergency_id]
    assert waiting["reason"] == REASON
    assert waiting["accesses"] == {"read": 2, "upload": 1, "classify": 1}
    reviewed = await review(service, emergency_id, "chief", outcome="follow_up", note="Ask why no call.")
    assert reviewed.status_code == 200, reviewed.text
    assert reviewed.json()["reviewer"] == "chief"
    assert emergency_id not in {access["emergency_id"] for access in await queue(service)}
    assert emergency_id in {access["emergency_id"] for access in await queue(service, reviewed=True)}
    again = await review(service, emergency_id, "chief-2")
    await service.hold_to_failure(again, 409, "conflict", "review_access")


@pytest.mark.parametrize("outcome", ["not_justified", "justified", "follow_up"])
async def test_what_was_not_justified_ends_with_the_verdict(service, outcome: str) -> None:
    """Were it to go on, or the glass broken twice over, the record would stay open for a day."""
    patient, subject = await service.care("dr-owner"), f"dr-{uuid4().hex[:8]}"
    lesion = (await service.upload(patient, subject="dr-owner")).json()["lesion_id"]
    first, second = [(await break_glass(service, subject, patient)).json()["emergency_id"] for _ in range(2)]
    elsewhere = (await break_glass(service, subject, f"p-{uuid4().hex[:8]}")).json()["emergency_id"]

    async def look() -> httpx.Response:
        return await service.client.get(f"/api/lesions/{lesion}", headers=service.token(subject))

    assert (await look()).status_code == 200
    reviewed = await review(service, first, "chief", outcome=outcome)
    service.hold_to("EmergencyAccessDocument", reviewed.json())
    ends = outcome == "not_justified"
    event = await service.hold_to_event(reviewed, "review_access", "success")
    assert event["detail"].get("ended") == ([second] if ends else None)
    answer = await look()
    assert answer.status_code == (403 if ends else 200)
    if not ends:
        assert (reviewed.json()["ended_at"], reviewed.json()["ended_by"]) == (None, None)
        return
    await service.hold_to_event(answer, "read", "denied", reason="assignment")
    assert reviewed.json()["ended_at"] == reviewed.json()["reviewed_at"]
    assert reviewed.json()["ended_by"] == "chief"
    (shown,) = [each for each in await queue(service, reviewed=True) if each["emergency_id"] == first]
    assert shown["ended_at"] == reviewed.json()["ended_at"]
    # The other is over as well, and still to be judged; the one to another patient goes on.
    waiting = {each["emergency_id"]: each["ended_by"] for each in await queue(service)}
    assert (waiting[second], waiting[elsewhere]) == ("chief", None)
    assert (await review(service, second, "chief-2", outcome="not_justified")).json()["ended_by"] == "chief"
    async with service.app.state.services.pool._pool.acquire() as connection:
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="stays so"):
            await connection.execute("UPDATE emergency_accesses SET ended_at = NULL, ended_by = NULL")
    # A new emergency is a new one, and reviewed anew.
    assert (await break_glass(service, subject, patient)).status_code == 201
    assert (await look()).status_code == 200


async def test_a_verdict_that_is_not_written_ends_nothing(service) -> None:
    """Both are one transaction, with the audit event."""
    emergency_id = (await break_glass(service, "dr-kept", "p-kept")).json()["emergency_id"]
    await service.owner.execute(
        "ALTER TABLE audit_events ADD CONSTRAINT none_of_p_kept CHECK (patient_id <> 'p-kept') NOT VALID"
    )
    try:
        refused = await review(service, emergency_id, "chief", outcome="not_justified")
    finally:
        await service.owner.execute("ALTER TABLE audit_events DROP CONSTRAINT none_of_p_kept")
    assert refused.status_code >= 400
    (waiting,) = [each for each in await queue(service) if each["emergency_id"] == emergency_id]
    assert (waiting["reviewed_at"], waiting["ended_at"]) == (None, None)


async def test_nobody_reviews_their_own(service) -> None:
    emergency_id = (await break_glass(service, "dr-own", "p-own", minutes=30)).json()["emergency_id"]
    own = await review(service, emergency_id, "dr-own")
    service.hold_to_problem(own, 403, "forbidden")
    event = await service.hold_to_event(own, "review_access", "denied")
    assert event["detail"]["reason"] == "own"
    assert (await review(service, emergency_id, "chief")).status_code == 200


async def test_one_request_does_not_lend_its_emergency_to_the_next(service) -> None:
    """And an assignment goes before an emergency."""
    patient, subject = await service.care("dr-owner"), f"dr-{uuid4().hex[:8]}"
    await break_glass(service, subject, patient)
    own = await service.care(subject)
    for asked, flagged in ((patient, True), (own, False), (patient, True), (patient, False)):
        if (asked, flagged) == (patient, False):
            await service.care(subject, patient)
        answer = await service.client.get(f"/api/lesions?patient_id={asked}", headers=service.token(subject))
        event = await service.hold_to_event(answer, "list", "success")
        assert ("emergency_access" in event["detail"]) is flagged


async def test_the_reason_is_kept_and_is_not_in_the_log(service) -> None:
    opened = await break_glass(service, "dr-secret", "p-secret", reason="Mrs Marker has a rash at work")
    (event,) = await service.events(opened)
    assert "Marker" not in str(dict(event))
    (waiting,) = [access for access in await queue(service) if access["patient_id"] == "p-secret"]
    assert waiting["reason"] == "Mrs Marker has a rash at work"


@pytest.mark.parametrize(
    "changed",
    [
        *({"reason": reason} for reason in ("short", " " * 40, "a reason with a \x00 in it", None)),
        *({"patient_id": patient} for patient in ("", "Jane Doe")),
        *({"minutes": minutes} for minutes in (0, 721, "many")),
        {"more": "than asked"},
    ],
    ids=repr,
)
async def test_what_is_no_emergency_is_refused(service, changed: dict[str, object]) -> None:
    before = await service.owner.fetchval("SELECT count(*) FROM emergency_accesses")
    answer = await break_glass(service, "dr", "p-none", **changed)
    service.hold_to_problem(answer, 422, "invalid_field")
    await service.hold_to_event(answer, "break_glass", "failed")
    assert await service.owner.fetchval("SELECT count(*) FROM emergency_accesses") == before


TWICE = b'{"patient_id": "p-1", "reason": "unconscious in casualty", "patient_id": "p-2"}'


@pytest.mark.parametrize(
    "body", [TWICE, b"", b"{", b"null", b"\xff", b"x" * 20_000, b'{"patient_id": "\\ud800"}']
)
async def test_a_body_that_is_no_form_is_refused(service, body: bytes) -> None:
    answer = await service.client.post("/api/emergency-access", content=body, headers=service.token("dr"))
    assert answer.status_code == (413 if len(body) > 16_384 else 422)
    assert (answer.json()["detail"] == "patient_id: sent twice.") is (body == TWICE)
    assert len(await service.events(answer)) == 1


async def test_the_service_cannot_widen_an_emergency(service) -> None:
    for change in ("ends_at = 'infinity'", "principal = 'me'", "reason = 'another reason'"):
        async with service.app.state.services.pool._pool.acquire() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(f"UPDATE emergency_accesses SET {change}")  # noqa: S608

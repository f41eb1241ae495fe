"""The outbox against a PMS that fails: nothing lost, nothing kept twice, in order, each disclosure on record once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
import random

import pytest

from serve_app.domain.errors import RecordsUnavailable
from serve_app.domain.identifiers import new_id
from serve_app.pms import delivery as delivery_module
from serve_app.pms import messages as messages_module
from serve_app.pms.client import CircuitBreaker
from serve_app.pms.delivery import LONGEST_WAIT_S, wait_s
from serve_app.pms.messages import PmsResource
from serve_app.records.answers import assessment_document, timeline_document
from serve_app.records.outbox import MessageKind, Outbox


def kept(pms, encounter: str) -> list[str]:
    return [body["assessment_id"] for _, body in pms.kept.get(encounter, [])]


async def test_a_finished_assessment_is_posted_with_what_the_answer_carries(queue, pms) -> None:
    finished = await queue.finish("e-1")
    assert await queue.delivery().deliver_due() == 1
    ((key, body),) = pms.kept["e-1"]
    assert body["assessment_id"] == str(finished)
    assert body["outcome"] == "review"
    assert body["classification"]["probabilities"]["MEL"] == 0.7
    assert body["links"] == {"encounter": f"{pms.url}/api/encounters/e-1"}
    assert {"risk", "similar", "neighbours", "change", "provenance", "reasons", "quality"} <= set(body)
    assert {"image", "sealed", "embedding"}.isdisjoint(body)
    (event,) = await queue.owner.fetch("SELECT * FROM audit_events WHERE action = 'disclose'")
    assert event["detail"] == {"recipient": "pms", "outcome": "review", "attempts": 1, "purpose": "HOPERAT"}
    assert (event["patient_id"], event["assessment_id"], event["request_id"]) == ("patient", finished, key)
    assert await queue.delivery().deliver_due() == 0


async def test_nothing_is_lost_while_the_pms_is_down(queue, pms) -> None:
    pms.stop()
    await queue.finish("e-2")
    await queue.delivery(dead_after=timedelta(0)).deliver_due()
    counts = await queue.outbox.counts()
    assert (counts.waiting, counts.dead, counts.oldest_waiting_s) == (0, 1, None)  # an outage of days
    finished = [str(await queue.finish("e-1")) for _ in range(5)]
    delivery = queue.delivery()
    for _ in range(5):
        assert await delivery.deliver_due() == 0
    counts = await queue.outbox.counts()
    assert (counts.waiting, counts.dead) == (5, 1)
    assert counts.oldest_waiting_s > 0
    (first, *_) = await queue.outbox.list(dead_only=False, limit=1)
    assert first.last_error.startswith("encounter_connection_")
    pms.start()
    await queue.drain(delivery)
    assert kept(pms, "e-1") == finished
    assert sorted(await queue.disclosures()) == sorted(finished)


class KilledBeforeNoting(Outbox):
    """An outbox that ends so, once, after the PMS's answer and before it is noted: killed, if nothing else is said."""

    ends: type[BaseException] | None = asyncio.CancelledError

    async def deliver(self, *arguments, **named) -> bool:
        ends, self.ends = self.ends, None
        if ends is not None:
            raise ends
        return await super().deliver(*arguments, **named)


@pytest.mark.parametrize("ends", [asyncio.CancelledError, RecordsUnavailable])
async def test_ended_between_post_and_note_the_pms_sees_one_key_twice_and_keeps_one(queue, pms, ends) -> None:
    await queue.finish("e-1")
    outbox = KilledBeforeNoting(queue.outbox._pool)
    outbox.ends = ends
    with pytest.raises(ends):
        await queue.delivery(outbox=outbox).deliver_due(lease_s=0.05)
    assert (len(pms.seen), await queue.disclosures()) == (1, [])
    await queue.drain(queue.delivery())
    assert len(pms.seen) == 2
    assert len(set(pms.seen)) == 1
    assert len(pms.kept["e-1"]) == 1
    assert len(await queue.disclosures()) == 1


async def test_many_senders_deliver_each_message_once_and_in_order(queue, pms) -> None:
    finished = {e: [str(await queue.finish(e)) for _ in range(4)] for e in ("e-1", "e-2")}
    async with asyncio.timeout(30):
        while (await queue.outbox.counts()).waiting:
            await asyncio.gather(*(queue.delivery().deliver_due() for _ in range(4)))
    assert {e: kept(pms, e) for e in finished} == finished
    assert len(pms.seen) == 8


async def test_a_message_that_is_refused_holds_up_its_encounter_for_an_hour_at_most(queue, pms) -> None:
    pms.fault = lambda request: "404" if "/e-1/" in request.url.path else None
    await queue.finish("e-1")
    elsewhere = await queue.finish("e-2")
    delivery = queue.delivery()
    await delivery.deliver_due()
    assert kept(pms, "e-2") == [str(elsewhere)]
    await queue.owner.execute(
        "UPDATE outbox SET waiting_since = now() - interval '61 minutes', due_at = now()"
    )
    second = await queue.finish("e-1")
    await delivery.deliver_due()
    (dead,) = await queue.outbox.list(dead_only=True, limit=10)
    assert dead.last_error == "http_404"
    pms.fault = lambda _: None
    await queue.drain(delivery)
    assert kept(pms, "e-1") == [str(second)]
    assert await queue.outbox.retry(None, actor="op", request_id="r") == 1
    await queue.drain(delivery)
    assert kept(pms, "e-1") == [str(second), str(dead.assessment_id)]
    events = await queue.owner.fetch("SELECT actor FROM audit_events WHERE action = 'outbox_retry'")
    assert [row["actor"] for row in events] == ["op"]


async def test_an_open_circuit_sends_nothing(queue, pms) -> None:
    asked = 0

    def count(_: object) -> str:
        nonlocal asked
        asked += 1
        return "500"

    pms.fault = count
    for n in range(20):
        await queue.finish(f"e-{n}")
    delivery = queue.delivery(breaker=CircuitBreaker(failures=3, rest_s=60))
    for _ in range(3):
        await delivery.deliver_due()
        await asyncio.sleep(0.02)
    assert asked <= 16  # one batch
    assert (await queue.outbox.counts()).waiting == 20


async def test_rounds_of_faults_lose_nothing_and_double_nothing(queue, pms) -> None:
    chance = random.Random(7)  # noqa: S311 - the same faults every time
    finished: dict[str, list[str]] = {f"e-{n}": [] for n in range(4)}
    pms.slow_s = 0.4
    every_fault = [None, None, "500", "404", "page", "wrong", "drop", "lost", "slow", "down", "kill"] * 4
    chance.shuffle(every_fault)
    for fault in every_fault:
        encounter = chance.choice(list(finished))
        finished[encounter].append(str(await queue.finish(encounter)))
        if fault == "down":
            pms.stop()
        faults = iter([fault] * chance.randint(1, 3) if fault not in {"down", "kill"} else [])
        pms.fault = lambda _, faults=faults: next(faults, None)
        outbox = KilledBeforeNoting(queue.outbox._pool) if fault == "kill" else queue.outbox
        delivery = queue.delivery(outbox=outbox, timeout_s=0.2)
        for _ in range(chance.randint(1, 2)):
            try:
                await delivery.deliver_due(lease_s=0.05)
            except asyncio.CancelledError:
                asyncio.current_task().uncancel()
        if fault == "down":
            pms.start()
    pms.fault = lambda _: None
    await queue.drain(queue.delivery(), within_s=60)
    assert {e: kept(pms, e) for e in finished} == finished
    every = [a for told in finished.values() for a in told]
    assert sorted(await queue.disclosures()) == sorted(every)
    assert len(pms.seen) > len(every)  # some came twice, and were kept once


async def said_to_the_clinician(queue, assessment_id) -> str | None:
    """Why the encounter has not got the answer, as the lesion's timeline says it."""
    found = await queue.lesions.assessment_record(assessment_id)
    timeline = await queue.lesions.timeline(found.lesion_id)
    (shown,) = timeline_document(timeline, pictured=()).answer()["assessments"]
    return shown["undelivered"]["code"] if "undelivered" in shown else None


@pytest.mark.parametrize("fault", ["slow", "500", "403", "404", "page", "wrong", "drop"])
async def test_nothing_is_sent_before_the_pms_has_confirmed_the_encounter(queue, pms, fault: str) -> None:
    pms.fault = lambda request: fault if request.method == "GET" else None
    finished = await queue.finish("e-1")
    assert await said_to_the_clinician(queue, finished) is None  # it is about to be sent
    delivery = queue.delivery(timeout_s=0.1)
    for _ in range(2):
        assert await delivery.deliver_due() == 0
        await queue.owner.execute("UPDATE outbox SET due_at = now()")
    assert (pms.seen, pms.kept) == ([], {})
    counts = await queue.outbox.counts()
    assert (counts.waiting, counts.unconfirmed, counts.dead) == (1, 1, 0)
    (held,) = await queue.outbox.list(dead_only=False, limit=1)
    assert held.last_error.startswith("encounter_")
    assert await said_to_the_clinician(queue, finished) == "encounter_not_confirmed"
    pms.fault = lambda _: None
    await queue.drain(queue.delivery())
    ((_, body),) = pms.kept["e-1"]
    assert body["assessment_id"] == str(finished)
    assert "undelivered" not in body
    assert await said_to_the_clinician(queue, finished) is None
    assert (await queue.outbox.counts()).unconfirmed == 0


async def test_another_patients_encounter_never_gets_the_answer(queue, pms) -> None:
    """Filed under it while the PMS did not answer: a finding of one may not be read as another's."""
    pms.register("another", "e-1")
    finished = await queue.finish("e-1")
    elsewhere = await queue.finish("e-2")
    delivery = queue.delivery()
    await queue.drain(delivery)
    for _ in range(2):
        assert pms.kept.keys() == {"e-2"}
        counts = await queue.outbox.counts()
        assert (counts.waiting, counts.dead, counts.wrong_encounter) == (0, 1, 1)
        (dead,) = await queue.outbox.list(dead_only=True, limit=10)
        assert (dead.assessment_id, dead.last_error, dead.attempts > 0) == (finished, "wrong_encounter", True)
        assert await said_to_the_clinician(queue, finished) == "wrong_encounter"
        # Sent again it is asked for again.
        assert await queue.outbox.retry(None, actor="op", request_id="r") == 1
        await queue.drain(delivery)
    denied = await queue.owner.fetch(
        "SELECT * FROM audit_events WHERE action = 'disclose' AND outcome = 'denied'"
    )
    assert [row["assessment_id"] for row in denied] == [finished] * 3
    assert denied[0]["detail"] == {"recipient": "pms", "code": "wrong_encounter", "purpose": "HOPERAT"}
    pms.encounters["e-1"] = "patient"  # the PMS was wrong, and was mended
    assert await queue.outbox.retry(dead.message_id, actor="op", request_id="r") == 1
    await queue.drain(delivery)
    assert kept(pms, "e-1") == [str(finished)]
    assert kept(pms, "e-2") == [str(elsewhere)]


async def test_each_attempt_asks_anew(queue, pms) -> None:
    """The PMS may have moved the encounter to another patient since the first."""
    pms.fault = lambda request: "500" if request.method == "POST" else None
    finished = await queue.finish("e-1")
    delivery = queue.delivery()
    await delivery.deliver_due()
    (waiting,) = await queue.outbox.list(dead_only=False, limit=1)
    assert (waiting.last_error, waiting.sent_at is not None) == ("http_500", True)
    assert await said_to_the_clinician(queue, finished) is None
    pms.fault = lambda _: None
    pms.register("another", "e-1")
    await queue.drain(delivery)
    assert pms.kept == {}
    assert (await queue.outbox.counts()).wrong_encounter == 1


async def test_an_encounter_that_the_pms_does_not_know_is_waited_for_for_an_hour(queue, pms) -> None:
    finished = await queue.finish("e-late")
    delivery = queue.delivery()
    await delivery.deliver_due()
    (held,) = await queue.outbox.list(dead_only=False, limit=1)
    assert (held.last_error, held.dead_at, pms.seen) == ("encounter_unknown", None, [])
    await queue.owner.execute(
        "UPDATE outbox SET waiting_since = now() - interval '61 minutes', due_at = now()"
    )
    await delivery.deliver_due()
    assert (await queue.outbox.counts()).dead == 1
    assert await said_to_the_clinician(queue, finished) == "encounter_unknown"
    pms.register("patient", "e-late")
    assert await queue.outbox.retry(None, actor="op", request_id="r") == 1
    await queue.drain(delivery)
    assert kept(pms, "e-late") == [str(finished)]


def test_the_wait_doubles_up_to_its_limit() -> None:
    assert 1.0 <= wait_s(1) <= 2.0
    assert 8.0 <= wait_s(4) <= 16.0
    assert LONGEST_WAIT_S / 2 <= wait_s(10_000) <= LONGEST_WAIT_S


SETBACKS = 2


@pytest.mark.parametrize("fault", ["500", "slow", "wrong", "defect"])
async def test_a_message_that_fails_while_others_get_through_is_set_aside_and_its_encounter_goes_on(
    queue, pms, monkeypatch, fault: str
) -> None:
    """Other than a refusal by 4xx, it may be the PMS's trouble: what tells is whether others get through."""
    monkeypatch.setattr(delivery_module, "DEAD_AFTER_SETBACKS", SETBACKS)
    poisoned = await queue.finish("e-1")

    def fails(request) -> str | None:
        return fault if "/e-1/" in request.url.path and fault != "defect" else None

    def make_document(image, lesion, **named):
        if image.assessment_id == poisoned and fault == "defect":
            raise KeyError("a document of a time before")
        return assessment_document(image, lesion, **named)

    monkeypatch.setattr(messages_module, "assessment_document", make_document)
    pms.fault = fails
    delivery = queue.delivery(timeout_s=0.4 if fault == "slow" else 2.0)
    behind = await queue.finish("e-1")
    for _ in range(4 * SETBACKS):
        await queue.finish("e-2")
        await queue.owner.execute("UPDATE outbox SET due_at = now(), lease_until = NULL")
        await delivery.deliver_due()
        if (await queue.outbox.counts()).dead:
            break
    (dead,) = await queue.outbox.list(dead_only=True, limit=10)
    assert dead.assessment_id == poisoned
    assert dead.last_error
    assert dead.attempts > SETBACKS
    pms.fault = lambda _: None
    await queue.owner.execute("UPDATE outbox SET due_at = now(), lease_until = NULL")
    await queue.drain(queue.delivery())
    assert kept(pms, "e-1") == [str(behind)]
    monkeypatch.undo()
    assert await queue.outbox.retry(dead.message_id, actor="op", request_id="r") == 1
    await queue.drain(queue.delivery())
    assert kept(pms, "e-1") == [str(behind), str(poisoned)]


async def test_attempts_in_an_outage_count_against_no_message(queue, pms, monkeypatch) -> None:
    monkeypatch.setattr(delivery_module, "DEAD_AFTER_SETBACKS", SETBACKS)
    finished = await queue.finish("e-1")
    pms.fault = lambda _: "500"
    delivery = queue.delivery()
    for _ in range(SETBACKS + 4):
        await queue.owner.execute("UPDATE outbox SET due_at = now()")
        await delivery.deliver_due()
        await asyncio.sleep(0.03)  # the breaker's rest
    assert (await queue.outbox.counts()).dead == 0
    pms.fault = lambda _: None
    await queue.owner.execute("UPDATE outbox SET due_at = now()")
    await queue.drain(delivery)
    assert kept(pms, "e-1") == [str(finished)]


async def test_each_kind_goes_its_own_way_in_the_order_of_its_encounter_and_a_report_holds_up_nothing(
    queue, pms
) -> None:
    """Of every kind that this version tells; one that it does not tell waits, and so does what comes after it."""
    finished = await queue.finish("e-1")
    insert = "INSERT INTO outbox (message_id, assessment_id, encounter_id, kind, subject_id) VALUES ($1, $2, $3, $4, $5)"
    review, outcome, report, later = (new_id() for _ in range(4))
    for about, encounter, kind, subject in (
        (None, None, "report", report),
        (finished, "e-1", "review", review),
        (None, None, "report", later),
        (finished, "e-1", "fhir", None),
        (finished, "e-1", "outcome", outcome),
    ):
        await queue.owner.execute(insert, new_id(), about, encounter, kind, subject)

    def names(field: str):
        async def body(message, found) -> dict[str, str]:
            assert (found is None) == (message.encounter_id is None)
            return {field: str(message.subject_id)}

        return body

    async def bundle(message, _) -> dict[str, object]:
        return {"resourceType": "Bundle", "id": str(message.assessment_id)}

    known = {
        MessageKind.ASSESSMENT: queue.delivery().resources[MessageKind.ASSESSMENT],
        MessageKind.REVIEW: PmsResource("reviews", "review_id", names("review_id")),
        MessageKind.OUTCOME: PmsResource("outcomes", "outcome_id", names("outcome_id")),
        MessageKind.REPORT: PmsResource("reports", "report_id", names("report_id")),
    }
    pms.fault = lambda request: "404" if request.url.path == "/api/reports" else None
    await queue.delivery(resources=known).deliver_due()
    assert [path for path, _ in pms.order] == [
        "/api/encounters/e-1/assessments",
        "/api/encounters/e-1/reviews",
    ]
    pms.fault = lambda _: None
    whole = known | {MessageKind.FHIR: PmsResource("reports", "id", bundle, "application/fhir+json")}
    await queue.drain(queue.delivery(resources=whole))
    assert [each for each in pms.order if "/e-1/" in each[0]][2:] == [
        ("/api/encounters/e-1/reports", "application/fhir+json"),
        ("/api/encounters/e-1/outcomes", "application/json"),
    ]
    assert [body["report_id"] for _, body in pms.others["/api/reports"]] == [str(report), str(later)]
    assert pms.asked.count("/api/encounters/e-1") == 4  # before each of the encounter's, and before no report
    events = await queue.owner.fetch(
        "SELECT patient_id, assessment_id, detail FROM audit_events WHERE action = 'disclose' ORDER BY event_id"
    )
    told = {(row["detail"].get("kind"), row["patient_id"], row["assessment_id"]) for row in events}
    about_it = {(kind, "patient", finished) for kind in (None, "review", "fhir", "outcome")}
    assert (len(events), told) == (6, about_it | {("report", None, None)})
    assert {row["detail"]["told_id"] for row in events if "kind" in row["detail"]} == {
        *map(str, (review, outcome, report, later, finished))
    }


@pytest.mark.parametrize(("kind", "field"), [("review", "review_id"), ("fhir", "id")])
async def test_an_acknowledgement_of_another_is_none(queue, pms, kind, field) -> None:
    finished, subject = await queue.finish("e-1"), new_id() if kind == "review" else None
    await queue.drain(queue.delivery())
    await queue.owner.execute(
        "INSERT INTO outbox (message_id, assessment_id, encounter_id, kind, subject_id) VALUES ($1, $2, 'e-1', $3, $4)",
        *(new_id(), finished, kind, subject),
    )

    async def told(*_) -> dict[str, str]:
        return {field: str(subject)}

    pms.fault = lambda request: "wrong" if request.method == "POST" else None
    delivery = queue.delivery(resources={MessageKind(kind): PmsResource("any", field, told)})
    await delivery.deliver_due()
    (waiting,) = await queue.outbox.list(dead_only=False, limit=1)
    assert (waiting.kind, waiting.last_error) == (kind, "acknowledged_another")

"""What came to nothing and what was erased is told to the PMS as well: once, in the same transaction, and no finding.

So is what a clinician said, until the image is erased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest

from serve_app.audit.events import AuditEvent, event_about
from serve_app.domain.assessment import Outcome
from serve_app.domain.errors import RecordsUnavailable
from serve_app.domain.identifiers import new_id
from serve_app.erasure.eraser import Eraser
from serve_app.keys.envelope import ImageBinding, seal
from serve_app.keys.keyring import FileKeyring
from serve_app.keys.keystore import KeyStore
from serve_app.keys.receipts import ErasureReason
from serve_app.records.answers import timeline_document
from serve_app.records.erasures import ErasureRequest, ErasureStore
from serve_app.records.lesion_rows import Admission
from serve_app.records.outbox import Outbox
from serve_app.records.reconciliation import reconcile
from serve_app.records.reviews import ReviewStore, Statement
from tests.serve_app.pms.test_delivery import said_to_the_clinician

#: What a finished assessment tells of the patient and the image, and of a finding nothing.
OPEN_WORDS = {"assessment_id", "lesion_id", "image_id", "patient_id", "encounter_id", "created_at", "links"}
NO_FINDINGS = {"quality", "classification", "risk", "neighbours", "change", "provenance"}


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    folder = tmp_path / "keys"
    with closing(KeyStore(folder / "keystore.sqlite", FileKeyring.make(folder / "keyring.json"))) as store:
        yield store


@pytest.fixture
def admission(admission, keys) -> Callable[..., Admission]:
    """As elsewhere, and its data key is in this key store: only that proves an erasure."""

    def make(**overrides: object) -> Admission:
        image_id = uuid4()
        binding = ImageBinding(image_id, "patient", "image/png")
        sealed = seal(b"image", data_key=keys.create(), binding=binding)
        return admission(image_id=image_id, sealed=sealed, **overrides)

    return make


@pytest.fixture
def eraser(queue, keys) -> Eraser:
    return Eraser(ErasureStore(queue.outbox._pool), keys, tells_pms=True)


async def request_of(queue, assessment_id: UUID) -> ErasureRequest:
    found = await queue.lesions.assessment_record(assessment_id)
    return ErasureRequest(
        lesion_id=found.lesion_id,
        image_id=found.image.image_id,
        reason=ErasureReason.PATIENT_REQUEST,
        note="Mrs Marker asked for it",
        actor="chief",
        request_id="erasing",
    )


async def erase(queue, eraser: Eraser, assessment_id: UUID) -> str:
    erasure, _ = await eraser.erase(await request_of(queue, assessment_id))
    assert erasure.receipt is not None
    return str(erasure.receipt_id)


async def fail(queue, admission, event, encounter_id: str | None = "e-1") -> UUID:
    new = admission(encounter_id=encounter_id, patient_id="patient")
    await queue.lesions.admit(new)
    failed = event("classify", outcome="failed", assessment_id=new.assessment_id)
    assert await queue.lesions.fail(new.assessment_id, "integrity", event=failed, message_id=new_id())
    return new.assessment_id


def hold_to_nothing_found(body: dict) -> None:
    assert {name: body[name] for name in NO_FINDINGS} == dict.fromkeys(NO_FINDINGS)
    assert (body["similar"], body["timings_ms"]) == ([], {})
    assert set(body) - NO_FINDINGS - {"similar", "timings_ms", "outcome", "reasons", "erasure"} == OPEN_WORDS
    assert "Marker" not in str(body)


async def told_of(queue) -> list[tuple[str, str]]:
    rows = await queue.owner.fetch(
        "SELECT request_id, detail ->> 'outcome' AS outcome FROM audit_events WHERE action = 'disclose'"
        " ORDER BY event_id"
    )
    return [(row["request_id"], row["outcome"]) for row in rows]


async def test_a_failed_assessment_is_told_once(queue, pms, admission, event) -> None:
    failed = await fail(queue, admission, event)
    await queue.drain(queue.delivery())
    ((key, body),) = pms.kept["e-1"]
    assert (body["assessment_id"], body["outcome"]) == (str(failed), "failed")
    assert body["reasons"][0]["code"] == "integrity"
    hold_to_nothing_found(body)
    assert await told_of(queue) == [(key, "failed")]
    # Ended already: neither a second end nor a second message.
    again = event("classify", outcome="failed", assessment_id=failed)
    assert not await queue.lesions.fail(failed, "integrity", event=again, message_id=new_id())
    assert (await queue.outbox.counts()).waiting == 0


async def test_the_erasure_of_what_was_told_is_told_under_a_key_of_its_own(queue, pms, eraser) -> None:
    finished = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    await queue.owner.execute("UPDATE outbox SET queued_at = now() - interval '1 year'")
    receipt_id = await erase(queue, eraser, finished)
    assert (await queue.outbox.counts()).oldest_waiting_s < 60
    await queue.drain(queue.delivery())
    (first, _), (second, body) = pms.kept["e-1"]
    assert second == receipt_id != first
    assert (body["assessment_id"], body["outcome"]) == (str(finished), "erased")
    assert (body["erasure"]["receipt_id"], body["erasure"]["reason"]) == (receipt_id, "patient_request")
    hold_to_nothing_found(body)
    assert await told_of(queue) == [(first, "review"), (second, "erased")]


async def test_the_erasure_of_what_is_pending_or_failed_is_told(queue, pms, eraser, admission, event) -> None:
    new = admission(encounter_id="e-1", patient_id="patient")
    await queue.lesions.admit(new)
    failed = await fail(queue, admission, event, "e-2")
    await queue.drain(queue.delivery())
    for each in (new.assessment_id, failed):
        await erase(queue, eraser, each)
    await queue.drain(queue.delivery())
    assert [body["outcome"] for _, body in pms.kept["e-1"]] == ["cancelled"]
    assert pms.kept["e-1"][0][1]["erasure"]["reason"] == "patient_request"
    assert [body["outcome"] for _, body in pms.kept["e-2"]] == ["failed", "erased"]


async def test_nothing_is_told_where_nobody_is_to_be(queue, eraser, keys, admission, event) -> None:
    silent = Eraser(ErasureStore(queue.outbox._pool), keys)
    await erase(queue, silent, await queue.finish("e-1"))
    await erase(queue, eraser, await queue.finish(None))
    await fail(queue, admission, event, encounter_id=None)
    assert (await queue.outbox.counts()).waiting == 0


async def test_what_is_erased_before_it_was_told_is_told_once_and_as_erased(queue, pms, eraser) -> None:
    finished = await queue.finish("e-1")
    receipts = await asyncio.gather(*(erase(queue, eraser, finished) for _ in range(4)))
    assert len(set(receipts)) == 1
    await queue.drain(queue.delivery())
    await erase(queue, eraser, finished)
    assert (await queue.outbox.counts()).waiting == 0
    ((key, body),) = pms.kept["e-1"]
    assert (key, body["outcome"]) == (receipts[0], "erased")
    hold_to_nothing_found(body)


async def test_an_accepted_erasure_is_told_with_its_receipt(queue, pms, eraser, monkeypatch) -> None:
    finished = await queue.finish("e-1")
    monkeypatch.setattr(eraser.keys, "destroy", Mock(side_effect=RecordsUnavailable))
    erasure, _ = await eraser.erase(await request_of(queue, finished))
    monkeypatch.undo()
    assert erasure.receipt is None
    assert (await queue.outbox.counts()).waiting == 0
    assert await eraser.finish_accepted(older_than_s=0) == 1
    await queue.drain(queue.delivery())
    assert [key for key, _ in pms.kept["e-1"]] == [str(erasure.receipt_id)]


@pytest.mark.parametrize("delivered_before", [True, False])
async def test_an_answer_that_comes_after_the_erasure_ends_no_message(
    queue, pms, eraser, *, delivered_before: bool
) -> None:
    """A sender has posted the findings and is late to note that: the erasure is told all the same, both on record."""
    finished = await queue.finish("e-1")

    class Late(Outbox):
        async def deliver(self, message_id, *, told, event):
            if told is Outcome.REVIEW:
                if delivered_before:
                    assert await super().deliver(message_id, told=told, event=event)
                await erase(queue, eraser, finished)
            return await super().deliver(message_id, told=told, event=event)

    await queue.delivery(outbox=Late(queue.outbox._pool)).deliver_due()
    assert (await queue.outbox.counts()).waiting == 1
    await queue.drain(queue.delivery())
    assert [body["outcome"] for _, body in pms.kept["e-1"]] == ["review", "erased"]
    told = [outcome for _, outcome in await told_of(queue)]
    assert (told[0], told[-1]) == ("review", "erased")


async def test_the_erasure_follows_what_was_sent_and_nothing_else(queue, pms, eraser) -> None:
    """Whosever the encounter is by now: what it has is to be deleted there, and what it never had is not told there."""
    sent = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    pms.register("another", "e-1", "e-2")
    kept_back = await queue.finish("e-2")
    await queue.drain(queue.delivery())
    receipt_id = await erase(queue, eraser, sent)
    await erase(queue, eraser, kept_back)
    await queue.drain(queue.delivery())
    assert [key for key, _ in pms.kept["e-1"]][1:] == [receipt_id]
    assert "e-2" not in pms.kept
    counts = await queue.outbox.counts()
    assert (counts.waiting, counts.dead, counts.wrong_encounter) == (0, 0, 0)


async def say(queue, assessment_id: UUID, *, image: bool = True, **said: object) -> UUID:
    """Have a clinician say something of an assessment, or what its lesion turned out to be; the PMS is to be told."""
    found = await queue.lesions.assessment_record(assessment_id)
    ids = {"patient_id": found.patient_id, "lesion_id": found.lesion_id}
    reviews, what = ReviewStore(queue.outbox._pool), "review" if "decision" in said else "record_outcome"
    event = AuditEvent(action=what, actor="dr", outcome="success", request_id="said", **ids)
    statement = Statement(lesion_id=found.lesion_id, said=said, event=event, tells_pms=True)
    if what == "review":
        said["assessment_id"] = str(assessment_id)
        return (await reviews.review(statement))[0].review_id
    said["image_id"] = str(found.image.image_id) if image else None
    return (await reviews.record_outcome(statement))[0].outcome_id


OUTCOME = {"kind": "histology", "diagnosis": "NV", "malignant": False, "observed_on": "2026-06-01"}
OUTCOME |= {"source": "pathology_report"}


async def test_what_is_said_is_told_in_its_order_and_once(queue, pms) -> None:
    finished, elsewhere = await queue.finish("e-1"), await queue.finish(None)
    spoken = {"decision": "override", "reason": "other", "level": "low", "note": "for the record"}
    review = await say(queue, finished, **spoken)
    outcome = await say(queue, finished, **OUTCOME)
    for said in (spoken, OUTCOME):  # an image that names no encounter
        await say(queue, elsewhere, **said)
    assert (await queue.outbox.counts()).waiting == 3
    await queue.drain(queue.delivery())
    base = "/api/encounters/e-1"
    assert [path for path, _ in pms.order] == [f"{base}/assessments", f"{base}/reviews", f"{base}/outcomes"]
    ((_, told),), ((_, known),) = pms.others[f"{base}/reviews"], pms.others[f"{base}/outcomes"]
    timeline = await queue.lesions.timeline(UUID(told["lesion_id"]))
    shown = timeline_document(timeline, pictured=()).answer()
    ids = {"lesion_id": str(timeline.lesion_id), "patient_id": "patient"}
    assert told == ids | shown["assessments"][0]["reviews"][0]
    assert known == ids | shown["outcomes"][0]
    assert (told["review_id"], told["note"], told["answers"]) == (
        str(review),
        spoken["note"],
        [str(finished)],
    )
    assert known["outcome_id"] == str(outcome)
    ((_, answer),) = pms.kept["e-1"]
    assert "reviews" not in answer


async def test_an_outcome_of_no_image_is_told_to_the_lesions_newest_encounter(queue, pms, admission) -> None:
    finished = await queue.finish("e-1")
    found = await queue.lesions.assessment_record(finished)
    for encounter in ("e-2", None):
        follow_up = admission(
            encounter_id=encounter, patient_id="patient", lesion_id=found.lesion_id, new_lesion=False
        )
        await queue.lesions.admit(follow_up)
        failed = event_about(follow_up, "classify", "failed")
        await queue.lesions.fail(follow_up.assessment_id, "integrity", event=failed)
    await say(queue, finished, image=False, **OUTCOME)
    await queue.drain(queue.delivery())
    assert list(pms.others) == ["/api/encounters/e-2/outcomes"]
    assert (await reconcile(queue.owner)).differences == ()


async def test_what_was_said_and_not_yet_told_is_withdrawn_with_the_image(queue, pms, eraser) -> None:
    finished = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    await say(queue, finished, decision="accept", note="Mrs Marker")
    await say(queue, finished, **OUTCOME)
    receipt_id = await erase(queue, eraser, finished)
    await queue.drain(queue.delivery())
    assert pms.others == {}
    assert [key for key, _ in pms.kept["e-1"]][1:] == [receipt_id]
    assert (await reconcile(queue.owner)).differences == ()


async def test_the_decision_on_what_an_erased_image_demanded_is_told(queue, pms, eraser) -> None:
    """Or the encounter would show a demand as open that is closed."""
    finished = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    receipt_id = await erase(queue, eraser, finished)
    review = await say(queue, finished, decision="accept")
    await queue.drain(queue.delivery())
    assert [key for key, _ in pms.kept["e-1"]][1:] == [receipt_id]
    ((_, told),) = pms.others["/api/encounters/e-1/reviews"]
    assert (told["review_id"], told["answers"]) == (str(review), [str(finished)])
    assert (await reconcile(queue.owner)).differences == ()


@pytest.mark.parametrize("said", [{"decision": "accept"}, OUTCOME])
async def test_where_the_pms_did_not_take_what_was_said_the_clinician_reads_so(queue, pms, said) -> None:
    """The encounter would show a demand as open that is closed, and nobody who treats the patient knew."""
    finished = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    await say(queue, finished, **said)
    assert await said_to_the_clinician(queue, finished) is None
    pms.fault = lambda request: "404" if request.method == "POST" else None
    await queue.owner.execute(
        "UPDATE outbox SET waiting_since = now() - interval '1 day' WHERE delivered_at IS NULL"
    )
    assert await queue.delivery().deliver_due() == 0
    assert (await queue.outbox.counts()).dead == 1
    assert await said_to_the_clinician(queue, finished) == "said_not_delivered"
    pms.fault = lambda _: None
    await queue.outbox.retry(None, actor="ops", request_id="r")
    await queue.drain(queue.delivery())
    assert await said_to_the_clinician(queue, finished) is None


async def test_the_review_of_an_image_that_is_erased_while_it_is_sent_is_on_record_as_told(
    queue, pms, eraser
) -> None:
    finished = await queue.finish("e-1")
    await queue.drain(queue.delivery())
    review = await say(queue, finished, decision="accept")
    delivery = queue.delivery()
    post = delivery.client.post

    async def erased_meanwhile(*path, **sent):
        answer = await post(*path, **sent)
        await erase(queue, eraser, finished)
        return answer

    delivery.client.post = erased_meanwhile
    await delivery.deliver_due()
    delivery.client.post = post
    rows = await queue.owner.fetch(
        "SELECT detail ->> 'told_id' AS told FROM audit_events WHERE action = 'disclose' AND detail ? 'kind'"
    )
    assert [row["told"] for row in rows] == [str(review)]
    await queue.drain(delivery)
    assert pms.kept["e-1"][-1][1]["outcome"] == "erased"
    assert (await reconcile(queue.owner)).differences == ()

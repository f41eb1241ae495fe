"""A demand is answered by a decision and by nothing else, and never changes; what is said once is only added to."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
import random
from uuid import UUID, uuid4

import asyncpg
import pytest

from serve_app.audit.events import AuditEvent, event_about
from serve_app.domain.assessment import Outcome, Reason, RiskLevel, Urgency
from serve_app.domain.errors import AssessmentPending, Conflict, Erased, IdempotencyMismatch, NotFound
from serve_app.domain.review import Decision
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import ErasureRequest, ErasureStore, Verdict
from serve_app.records.health import find_violations
from serve_app.records.lesion_rows import Admission
from serve_app.records.lesions import LesionStore
from serve_app.records.outbox import Outbox
from serve_app.records.pool import Pool, queries
from serve_app.records.reconciliation import reconcile
from serve_app.records.reviews import ReviewStore, Statement

LEVELS, URGENCIES = list(RiskLevel), list(Urgency)
#: How often each action is drawn.
ACTIONS = {"upload": 8, "late": 2, "review": 8, "erase": 2, "outcome": 2, "confirm": 2, "look": 1}
ACTED = 1_000
HELD = ("erased_images_leave_nothing", "demands_answered_by_decisions")


@dataclass
class Image:
    """What an image demanded, and whether that is answered, as the test reckons."""

    admission: Admission
    state: str = "pending"
    demand: tuple[int, int] | None = None
    answered: bool = False


@dataclass
class History:
    """Lesions as they should be, and the stores that they are done to."""

    app: Pool
    owner: Pool
    make: dict[str, object]
    space: str
    chance: random.Random
    lesions: dict[UUID, list[Image]] = field(default_factory=dict)

    async def act(self, action: str) -> UUID | None:
        """Do something to some lesion; returns which."""
        if action == "upload" or not self.lesions:
            return await self.upload()
        lesion_id = self.chance.choice(list(self.lesions))
        image = self.chance.choice(self.lesions[lesion_id])
        await getattr(self, action)(lesion_id, image)
        return lesion_id

    async def upload(self) -> UUID:
        known = list(self.lesions)
        lesion_id = self.chance.choice(known) if known and self.chance.random() < 0.75 else uuid4()
        # In any order, and some at the same moment.
        taken = datetime(2026, 6, 1, tzinfo=UTC) + timedelta(hours=self.chance.randint(0, 12))
        named = {"lesion_id": lesion_id, "new_lesion": lesion_id not in self.lesions, "created_at": taken}
        encounter = self.chance.choice([None, "e-1"])
        image = Image(self.make["admission"](**named, encounter_id=encounter))
        await LesionStore(self.app).admit(image.admission)
        self.lesions.setdefault(lesion_id, []).append(image)
        if self.chance.random() < 0.85:
            await self.late(lesion_id, image)
        return lesion_id

    async def late(self, _: UUID, image: Image) -> None:
        """Finish one that is pending, in some way; nothing where it is not."""
        records, case = LesionStore(self.app), image.admission
        event = event_about(case, "classify")
        end = self.chance.choice(["answered"] * 4 + ["refused", "referred", "failed"])
        level, urgency = self.chance.choice(LEVELS), self.chance.choice(URGENCIES)
        assessment, named = self.make["assessment"], {"embedding_space": self.space, "event": event}
        message = {"message_id": uuid4() if case.encounter_id else None}
        if end == "failed":
            failed = replace(event, outcome="failed")
            done = await records.fail(case.assessment_id, "integrity", event=failed, **message)
        elif end == "answered":
            risk = replace(assessment().risk, level=level, urgency=urgency)
            done = await records.complete(case.assessment_id, assessment(risk=risk), **named, **message)
        else:
            code = "checklist_demands_referral" if end == "referred" else "blurred"
            nothing = {"classification": None, "risk": None, "embedding": None}
            refusal = assessment(outcome=Outcome.REFUSED, reasons=(Reason(code, "m", "a"),), **nothing)
            done = await records.complete(case.assessment_id, refusal, **named, **message)
        assert done == (image.state == "pending")
        if done:
            image.state = "failed" if end == "failed" else "done"
            demands = {"answered": (LEVELS.index(level), URGENCIES.index(urgency)), "referred": (2, 2)}
            image.demand = demands.get(end)

    def refusal(self, image: Image, said: Mapping[str, object]) -> type[Exception] | None:
        """What comes of saying this of an image as it is."""
        decides = said["decision"] is not None
        beside = {"note", "impression_diagnosis"} & said.keys()
        if image.state == "erased":
            return None if decides and image.demand is not None and not beside else Erased
        if image.state == "pending":
            return AssessmentPending if decides else None
        return Conflict if image.state == "failed" else None

    async def review(self, lesion_id: UUID, image: Image) -> None:
        decision = self.chance.choice([None, "accept", "override", "override"])
        said: dict[str, object] = {"decision": decision}
        if decision is None or self.chance.random() < 0.3:
            said |= {"impression_diagnosis": "NV", "intended_referral": "none"}
        if decision == "override":
            said |= {"reason": "second_opinion", "level": self.chance.choice(LEVELS)}
        if decision is not None and self.chance.random() < 0.5:
            said["note"] = "words"
        refusal = self.refusal(image, said)
        spoken = statement(image.admission, **said)
        spoken = replace(spoken, tells_pms=True)
        if refusal is not None:
            with pytest.raises(refusal):
                await ReviewStore(self.app).review(spoken)
            return
        review, demand, is_new = await ReviewStore(self.app).review(spoken)
        closed = []
        if decision is not None and image.demand is not None:
            for other in self.lesions[lesion_id]:
                older = other.admission.created_at <= image.admission.created_at
                covered = other.demand is not None and all(
                    theirs <= ours for theirs, ours in zip(other.demand, image.demand, strict=True)
                )
                if older and covered and not other.answered:
                    other.answered = True
                    closed.append(other.admission.assessment_id)
        assert (is_new, set(review.answers)) == (True, set(closed))
        assert review.note == said.get("note")
        if decision == "accept":
            accepted = (None, None) if image.demand is None else image.demand
            assert ranks(review) == accepted
        assert (None if demand is None else ranks(demand)) == self.demanded(lesion_id)

    async def erase(self, lesion_id: UUID, image: Image) -> None:
        request = ErasureRequest(
            lesion_id=lesion_id,
            image_id=image.admission.image_id,
            reason=ErasureReason.PATIENT_REQUEST,
            actor="chief",
        )
        verdict = await ErasureStore(self.app).accept(request)
        assert verdict == (Verdict.ERASED if image.state == "erased" else Verdict.ACCEPTED)
        image.state = "erased"

    async def outcome(self, _: UUID, image: Image) -> None:
        named = {} if self.chance.random() < 0.5 else {"image_id": str(image.admission.image_id)}
        said = {"kind": "histology", "diagnosis": "NV", "malignant": False, "source": "clinician"}
        spoken = statement(image.admission, "record_outcome", observed_on="2026-06-01", **said, **named)
        spoken = replace(spoken, said={**spoken.said} | {"assessment_id": None}, tells_pms=True)
        if named and image.state == "erased":
            with pytest.raises(Erased):
                await ReviewStore(self.app).record_outcome(spoken)
            return
        await ReviewStore(self.app).record_outcome(spoken)

    async def confirm(self, lesion_id: UUID, image: Image) -> None:
        event = event_about(image.admission, "confirm")
        confirming = LesionStore(self.app).confirm(
            lesion_id, image.admission.image_id, confirmed_by="dr", event=event
        )
        if image.state == "erased":
            with pytest.raises(Erased):
                await confirming
        else:
            await confirming

    async def look(self, lesion_id: UUID, image: Image) -> None:
        timeline = await LesionStore(self.app).timeline(lesion_id)
        (shown,) = [each for each in timeline.images if each.image_id == image.admission.image_id]
        assert image.state != "erased" or all(review.note is None for review in shown.reviews)

    def demanded(self, lesion_id: UUID) -> tuple[int, int] | None:
        """The highest level and the highest urgency that nobody has answered."""
        demands = [each.demand for each in self.lesions[lesion_id] if each.demand and not each.answered]
        return tuple(map(max, *demands, demands[0])) if demands else None

    async def hold(self, *lesions: UUID) -> None:
        """Hold what is on record of lesions against what it should be."""
        for lesion_id in lesions:
            rows = await self.owner.fetch(
                "SELECT assessment_id, demand_level, demand_urgency, demand_answered_at IS NOT NULL AS answered"
                " FROM assessments JOIN lesion_images USING (image_id) WHERE lesion_id = $1",
                lesion_id,
            )
            found = {
                row["assessment_id"]: (
                    None
                    if row["demand_level"] is None
                    else (LEVELS.index(row["demand_level"]), URGENCIES.index(row["demand_urgency"])),
                    row["answered"],
                )
                for row in rows
            }
            assert found == {
                each.admission.assessment_id: (each.demand, each.answered) for each in self.lesions[lesion_id]
            }
            demand = await LesionStore(self.app).open_demand(lesion_id)
            assert (None if demand is None else ranks(demand)) == self.demanded(lesion_id)


def ranks(found) -> tuple[int | None, int | None]:
    if found.level is None:
        return None, None
    return LEVELS.index(found.level), URGENCIES.index(found.urgency)


def statement(
    case: Admission, action: str = "review", clinician: str = "dr-own", **said: object
) -> Statement:
    event = AuditEvent(
        action=action,
        actor=clinician,
        outcome="success",
        request_id=str(uuid4()),
        patient_id=case.patient_id,
        lesion_id=case.lesion_id,
    )
    return Statement(
        lesion_id=case.lesion_id, said={"assessment_id": str(case.assessment_id), **said}, event=event
    )


@pytest.fixture
def reviews(pool) -> ReviewStore:
    return ReviewStore(pool)


@pytest.mark.parametrize("seed", [1])
async def test_a_thousand_actions_and_only_a_decision_answers_a_demand(
    pool, owner_pool, admission, assessment, space, seed
) -> None:
    """Whatever is done in whichever order; the model that it is held against knows nothing of the statements."""
    chance = random.Random(seed)  # noqa: S311 - the same histories every time
    made = {"admission": admission, "assessment": assessment}
    history = History(pool, owner_pool, made, space, chance)
    for number in range(ACTED):
        lesion_id = await history.act(chance.choices(list(ACTIONS), list(ACTIONS.values()))[0])
        await history.hold(lesion_id)
        if number % 100 == 99:
            await history.hold(*history.lesions)
    assert [each for each in await find_violations(pool) if each.name in HELD] == []
    states = {image.state for images in history.lesions.values() for image in images}
    assert states == {"pending", "done", "failed", "erased"}
    assert (await reconcile(pool)).differences == ()


@pytest.mark.parametrize("decision", list(Decision))
async def test_a_decision_answers_what_it_covers_and_leaves_the_rest_open(
    answered, reviews, lesions, decision
) -> None:
    now = datetime.now(UTC)
    first = await answered("medium", "urgent", created_at=now - timedelta(hours=5))
    others = {
        "lower": ("low", "routine", -4),
        "same": ("medium", "expedited", -3),
        "more urgent": ("low", "urgent", -3),
        "higher": ("high", "routine", -2),
        "later": ("low", "routine", 1),
    }
    cases = {}
    for name, (level, urgency, hours) in others.items():
        taken = {
            "created_at": now + timedelta(hours=hours),
            "lesion_id": first.lesion_id,
            "new_lesion": False,
        }
        cases[name] = await answered(level, urgency, **taken)
    reviewed = await answered(
        "medium", "expedited", created_at=now, lesion_id=first.lesion_id, new_lesion=False
    )
    own = {"reason": "known_lesion", "level": "low"} if decision is Decision.OVERRIDE else {}
    review, demand, _ = await reviews.review(statement(reviewed, decision=decision, **own))
    closed = {reviewed.assessment_id, cases["lower"].assessment_id, cases["same"].assessment_id}
    assert set(review.answers) == closed
    assert (demand.level, demand.urgency, demand.image_id) == ("high", "urgent", cases["higher"].image_id)
    again, _, _ = await reviews.review(statement(reviewed, decision="accept"))
    assert again.answers == ()
    timeline = await lesions.timeline(first.lesion_id)
    (shown,) = [each for each in timeline.images if each.image_id == reviewed.image_id]
    assert [each.review_id for each in shown.reviews] == [review.review_id, again.review_id]
    assert shown.assessment.risk.level == "medium"  # the answer is as it was


async def test_of_many_decisions_at_once_each_demand_is_answered_by_one(answered, reviews, pool) -> None:
    first = await answered()
    cases = [first] + [await answered(lesion_id=first.lesion_id, new_lesion=False) for _ in range(3)]
    spoken = [statement(case, decision="accept") for case in cases * 3]
    found = await asyncio.gather(*map(reviews.review, spoken))
    closed = [each for review, _, _ in found for each in review.answers]
    assert sorted(closed) == sorted(case.assessment_id for case in cases)
    assert (await reconcile(pool)).differences == ()


async def test_a_review_waits_for_an_erasure_and_for_another_review(
    answered, reviews, pool, owner_pool
) -> None:
    """A note must not outlive its image; and two that would answer the same demands do not get into each other's way."""
    case = await answered()
    spoken = statement(case, decision="accept", note="Mrs Marker")
    async with owner_pool.connection() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT FROM lesions WHERE lesion_id = $1 FOR NO KEY UPDATE", case.lesion_id)
        first = asyncio.create_task(reviews.review(spoken))
        assert not (await asyncio.wait({first}, timeout=0.2))[0]
        await transaction.rollback()
        assert (await first)[0].note == "Mrs Marker"
        transaction = connection.transaction()
        await transaction.start()
        erase = "SELECT erase_image($1, $2, $3, 'patient_request', NULL, 'boss', 'r')"
        assert await connection.fetchval(erase, case.lesion_id, case.image_id, uuid4()) == "accepted"
        second = asyncio.create_task(reviews.review(spoken))
        assert not (await asyncio.wait({second}, timeout=0.2))[0]
        await transaction.commit()
        with pytest.raises(Erased):
            await second
    (row,) = await owner_pool.fetch("SELECT * FROM reviews WHERE assessment_id = $1", case.assessment_id)
    assert (row["decision"], row["note"]) == ("accept", None)
    assert (await reconcile(pool)).differences == ()


async def test_a_key_leads_to_one_review_and_to_nothing_else(answered, reviews) -> None:
    case = await answered()
    spoken = replace(statement(case, decision="accept"), key="k-1", request_sha256=b"1" * 32)
    found = await asyncio.gather(*(reviews.review(spoken) for _ in range(5)))
    assert {review.review_id for review, _, _ in found} == {found[0][0].review_id}
    assert sorted(is_new for _, _, is_new in found) == [False] * 4 + [True]
    with pytest.raises(IdempotencyMismatch):
        await reviews.review(replace(spoken, request_sha256=b"2" * 32))
    # What is refused spends no key.
    other = replace(spoken, key="k-2", said={**spoken.said, "assessment_id": str(uuid4())})
    with pytest.raises(NotFound):
        await reviews.review(other)
    assert (await reviews.review(replace(spoken, key="k-2")))[2]


async def test_what_was_said_is_never_changed(answered, reviews, owner_pool) -> None:
    case = await answered()
    await reviews.review(statement(case, decision="accept", note="n"))
    outcome = {"kind": "follow_up", "malignant": True, "source": "registry", "observed_on": "2026-06-01"}
    for _ in range(2):  # a later one adds
        await reviews.record_outcome(replace(statement(case, "record_outcome"), said=outcome))
    assert (
        await owner_pool.fetchval("SELECT count(*) FROM lesion_outcomes WHERE lesion_id = $1", case.lesion_id)
        == 2
    )
    for harm in (
        "UPDATE reviews SET level = 'low'",
        "UPDATE reviews SET note = 'other'",
        "UPDATE reviews SET note = NULL, clinician = 'x'",
        "DELETE FROM reviews",
        "TRUNCATE reviews CASCADE",
        "UPDATE lesion_outcomes SET malignant = false",
        "DELETE FROM lesion_outcomes",
        "TRUNCATE lesion_outcomes",
    ):
        async with owner_pool.connection() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(harm)


#: What the clinician did since the answer, of what, and whether they may have seen it there. `other`: another lesion of the
#: patient; `shown`, `hidden`: a page of the worklist with the lesion or without.
GIVEN = {
    "read lesion": True,
    "replay lesion": True,
    "review lesion": True,
    "read_report lesion": True,
    "list patient": True,
    "view_worklist shown": True,
    "view_worklist hidden": False,
    "something_new lesion": True,
    "something_new patient": True,
    "download lesion": False,
    "confirm lesion": False,
    "record_outcome lesion": False,
    "upload lesion": False,
    "classify lesion": False,
    "read other": False,
    "view_reference nothing": False,
}


@pytest.mark.parametrize("done", GIVEN)
async def test_an_impression_is_before_the_answer_unless_the_log_says_that_it_was_given(
    answered, reviews, lesions, done
) -> None:
    case, clinician = await answered(actor="nurse", patient_id=str(uuid4())), f"dr-{uuid4().hex[:8]}"
    action, what = done.split()
    about = {
        "lesion": {"patient_id": case.patient_id, "lesion_id": case.lesion_id},
        "patient": {"patient_id": case.patient_id},
        "other": {"patient_id": case.patient_id, "lesion_id": uuid4()},
        "nothing": {},
        "shown": {"detail": {"shown": {case.patient_id: [str(case.lesion_id), str(uuid4())]}}},
        "hidden": {"detail": {"shown": {case.patient_id: [str(uuid4())], "p": [str(case.lesion_id)]}}},
    }[what]
    event = AuditEvent(action=action, actor=clinician, outcome="success", request_id="r", **about)
    for other in ({"outcome": "denied"}, {"actor": "somebody else"}):
        await lesions.record_event(replace(event, **other))
    thought = {"impression_diagnosis": "MEL", "intended_referral": "urgent"}
    spoken = statement(case, clinician=clinician, **thought)
    assert not await reviews._pool.fetchval(queries("reviews")["given"], clinician, case.assessment_id)
    await lesions.record_event(event)
    review, _, _ = await reviews.review(spoken)
    assert review.impression.before_answer is not GIVEN[done]
    # The answer to that shows what the lesion demands.
    later, _, _ = await reviews.review(statement(case, clinician=clinician, **thought))
    assert later.impression.before_answer is False


async def test_whoever_decides_on_an_answer_was_given_it(answered, reviews) -> None:
    """By a PMS that read it under its own account, say, of which nothing here knows."""
    case = await answered(actor="nurse", patient_id=str(uuid4()))
    spoken = statement(case, clinician=f"dr-{uuid4().hex[:8]}", impression_diagnosis="NV", decision="accept")
    review, _, _ = await reviews.review(spoken)
    assert review.impression.before_answer is False


async def test_whoever_waited_for_the_answer_was_given_it_and_whoever_got_202_was_not(
    answered, reviews, lesions, owner_pool, admission
) -> None:
    thought = {"impression_diagnosis": "MEL"}

    async def before(case: Admission) -> bool:
        given = await reviews._pool.fetchval(queries("reviews")["given"], "dr", case.assessment_id)
        return not given

    case = await answered()  # dr's own
    assert not await before(case)
    await owner_pool.execute(
        "UPDATE assessments SET attempts = 1 WHERE assessment_id = $1", case.assessment_id
    )
    assert await before(case)
    pending = admission()
    await lesions.admit(pending)
    review, _, _ = await reviews.review(statement(pending, clinician="dr", **thought))
    assert (review.impression.before_answer, review.decision, review.answers) == (True, None, ())
    # A message to the PMS, where everybody reads it: from when it may be there.
    message = "INSERT INTO outbox (message_id, assessment_id, encounter_id) VALUES ($1, $2, 'e')"
    await owner_pool.execute(message, message_id := uuid4(), case.assessment_id)
    assert await before(case)
    await Outbox(owner_pool).note_sent(message_id)
    assert not await before(case)
    await owner_pool.execute("DELETE FROM outbox WHERE message_id = $1", message_id)
    assert await before(case)
    # Another image of the lesion, answered later, shows what the first one demands.
    await answered(lesion_id=case.lesion_id, new_lesion=False)
    assert not await before(case)

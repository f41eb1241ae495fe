"""What waits: the open demands of the record, no later image puts one off, and pages without gap or repetition."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
import random
from typing import Any
from uuid import UUID, uuid4

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from serve_app.domain.assessment import Outcome, Reason, RiskLevel, Urgency
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool
from serve_app.records.worklist import WorkAction, WorkItem, WorkKind, WorklistStore

DAYS = {"urgent": 14, "expedited": 28, "routine": 126}
LEVELS, URGENCIES = list(RiskLevel), list(Urgency)
TODAY = datetime.now(UTC)


@dataclass
class Record:
    """Lets things happen to one principal's patient, so many days ago."""

    lesions: LesionStore
    owner: Pool
    #: What makes values: `admission`, `assessment`, `event`; and the `space`.
    made: dict[str, Any]
    principal: str = field(default_factory=lambda: f"dr-{uuid4().hex[:8]}")
    patient: str = field(default_factory=lambda: f"p-{uuid4().hex[:8]}")

    async def care(self, patient: str | None = None, *, ends: datetime | None = None) -> None:
        care = "INSERT INTO care_assignments VALUES ($1, $2, $3, $4)"
        since = TODAY - timedelta(days=999)
        await self.owner.execute(care, patient or self.patient, self.principal, since, ends)

    async def image(
        self, end: str, level="low", urgency="routine", *, days: float = 0, lesion: UUID | None = None
    ):
        case = self.made["admission"](
            lesion_id=lesion or uuid4(),
            new_lesion=lesion is None,
            patient_id=self.patient,
            created_at=datetime.now(UTC) - timedelta(days=days),
        )
        await self.lesions.admit(case)
        done = {"embedding_space": self.made["space"], "event": self.made["event"]("classify")}
        if end in {"decided", "review"}:
            risk = replace(self.made["assessment"]().risk, level=RiskLevel(level), urgency=Urgency(urgency))
            finished = self.made["assessment"](outcome=Outcome(end), risk=risk)
            await self.lesions.complete(case.assessment_id, finished, **done)
        elif end.startswith("refused"):
            code = "checklist_demands_referral" if "referred" in end else "blurred"
            nothing = {"classification": None, "risk": None, "embedding": None}
            refusal = self.made["assessment"](
                outcome=Outcome.REFUSED, reasons=(Reason(code, "m", "a"),), **nothing
            )
            await self.lesions.complete(case.assessment_id, refusal, **done)
        elif end == "failed":
            await self.lesions.fail(case.assessment_id, "integrity", event=self.made["event"]("classify"))
        return case

    async def erase(self, case) -> None:
        erase = "SELECT erase_image($1, $2, $3, 'patient_request', NULL, 'boss', 'r')"
        assert await self.owner.fetchval(erase, case.lesion_id, case.image_id, uuid4()) == "accepted"

    async def decide(self, case, follow_up: date | None = None, *, days: float = 0) -> None:
        await self.owner.execute(
            "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, decision, level, urgency,"
            " follow_up_by, recorded_at) VALUES ($1, $2, 'dr', 'r', 'accept', 'medium', 'routine', $3, $4)",
            *(uuid4(), case.assessment_id, follow_up, datetime.now(UTC) - timedelta(days=days)),
        )
        answered = "UPDATE assessments SET demand_answered_at = now() WHERE assessment_id = $1 AND demand_level IS NOT NULL"
        await self.owner.execute(answered, case.assessment_id)

    async def outcome(self, case, observed_on: date | None = None) -> None:
        await self.owner.execute(
            "INSERT INTO lesion_outcomes (outcome_id, lesion_id, kind, malignant, observed_on, source, recorded_by,"
            " request_id) VALUES ($1, $2, 'follow_up', false, $3, 'clinician', 'dr', 'r')",
            *(uuid4(), case.lesion_id, observed_on or datetime.now(UTC).date()),
        )

    async def list(self, *kinds: str, **asked) -> list[WorkItem]:
        chosen = [WorkKind(kind) for kind in kinds] or list(WorkKind)
        return await WorklistStore(self.owner, DAYS).worklist(
            self.principal, kinds=chosen, **{"limit": 1000, **asked}
        )

    async def told(self, *kinds: str) -> list[tuple[str, UUID]]:
        return [(item.kind.value, item.image_id) for item in await self.list(*kinds)]


@pytest.fixture
def record(lesions, owner_pool, admission, assessment, event, space) -> Record:
    made = {"admission": admission, "assessment": assessment, "event": event, "space": space}
    return Record(lesions, owner_pool, made)


ENDS = ("decided", "review", "refused", "refused, referred", "failed", "pending")
IMAGES = st.lists(
    st.tuples(
        *(st.sampled_from(each) for each in (ENDS, LEVELS, URGENCIES)),
        st.integers(0, 200),
        *(st.booleans(), st.booleans()),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=IMAGES)
async def test_each_open_demand_is_listed_as_it_is_and_nothing_later_puts_it_off(
    record, lesions, images
) -> None:
    """Whatever becomes of the images, erased and decided on or not: one item a lesion, of its open demand."""
    record.principal = f"dr-{uuid4().hex}"
    await record.care()
    lesion, due = None, {}
    for end, level, urgency, days, erased, decided in sorted(images, key=lambda each: -each[3]):
        case = await record.image(end, level, urgency, days=days, lesion=lesion)
        lesion = case.lesion_id
        if erased:
            await record.erase(case)
        found = [item for item in await record.list() if item.lesion_id == lesion]
        demand, by_kind = await lesions.open_demand(lesion), Counter(item.kind for item in found)
        listed = [item for item in found if item.kind is WorkKind.DEMAND]
        assert [
            (item.level, item.urgency, item.image_id, item.assessment_id, item.since) for item in listed
        ] == (
            []
            if demand is None
            else [(demand.level, demand.urgency, demand.image_id, demand.assessment_id, demand.since)]
        )
        if listed:
            assert listed[0].due <= due.get("due", listed[0].due)
            due["due"] = listed[0].due
        assert (
            max((n for kind, n in by_kind.items() if kind in {"demand", "failed", "refused"}), default=1) == 1
        )
        assert len({(item.kind, item.image_id) for item in found}) == len(found)
        # An image is listed once, and everything in doubt that nobody decided on is, however it is asked for.
        images_listed = Counter(item.image_id for item in found if item.kind is not WorkKind.FOLLOW_UP)
        assert max(images_listed.values(), default=1) == 1
        if decided:
            await record.decide(case)
            due.clear()


async def test_only_the_callers_own_care_is_listed_and_an_emergency_is_flagged(record) -> None:
    case = await record.image("decided", "high", "urgent")
    assert await record.list() == []
    await record.care(ends=TODAY - timedelta(days=1))
    await record.care("another")
    assert await record.list() == []
    broke = "INSERT INTO emergency_accesses (emergency_id, patient_id, principal, reason, ends_at) VALUES ($1, $2, $3, 'long enough', $4)"
    over, emergency = uuid4(), uuid4()
    await record.owner.execute(broke, over, record.patient, record.principal, TODAY + timedelta(hours=2))
    await record.owner.execute(
        "UPDATE emergency_accesses SET ended_at = now(), ended_by = 'x' WHERE emergency_id = $1", over
    )
    assert await record.list() == []
    await record.owner.execute(broke, emergency, record.patient, record.principal, TODAY + timedelta(hours=1))
    (item,) = await record.list()
    assert (item.image_id, item.emergency, item.emergency_access) == (case.image_id, emergency, True)
    # An assignment goes first.
    await record.owner.execute(
        "INSERT INTO care_assignments VALUES ($1, $2, now(), NULL)", record.patient, record.principal
    )
    (item,) = await record.list()
    assert (item.emergency, item.emergency_access) == (None, False)


@pytest.mark.parametrize(
    ("end", "level", "urgency", "kind", "action", "days"),
    [
        ("decided", "high", "urgent", "demand", WorkAction.REFER_URGENTLY, 14),
        ("decided", "high", "expedited", "demand", WorkAction.REFER_SOON, 28),
        ("decided", "medium", "routine", "demand", WorkAction.REFER, 126),
        ("decided", "low", "routine", "demand", WorkAction.DECIDE, 126),
        ("review", "low", "routine", "demand", WorkAction.REVIEW_IMAGE, 14),
        ("review", "medium", "expedited", "demand", WorkAction.REFER_SOON, 14),
        ("refused, referred", None, None, "demand", WorkAction.REFER_URGENTLY, 14),
        ("refused", None, None, "refused", WorkAction.REPEAT_IMAGE, 14),
        ("failed", None, None, "failed", WorkAction.REPEAT_IMAGE, 14),
        ("pending", None, None, "pending", WorkAction.CHECK_LATER, 14),
    ],
)
async def test_what_is_to_be_done_and_by_when(record, end, level, urgency, kind, action, days) -> None:
    """Due from the image on; overdue the day after, not on the day."""
    await record.care()
    for age, overdue in ((days, False), (days + 1, True)):
        case = await record.image(end, level, urgency, days=age)
        item = next(item for item in await record.list() if item.image_id == case.image_id)
        assert (item.kind, item.action.code) == (kind, action)
        assert item.due == case.created_at.date() + timedelta(days=days)
        assert item.overdue is overdue
        # In doubt, it is said once.
        assert ("in doubt" in item.action.message) is (end == "review")
        assert item.action.message.count("in doubt") <= 1


async def test_an_image_in_doubt_waits_for_a_decision_beside_its_lesions_demand(record) -> None:
    await record.care()
    first = await record.image("decided", "high", "urgent", days=3)
    doubt = await record.image("review", "low", "routine", lesion=first.lesion_id)
    assert await record.told() == [("demand", first.image_id), ("review", doubt.image_id)]
    assert await record.told("review") == [("review", doubt.image_id)]
    # Where the demand is not asked for, its image in doubt is listed as such.
    alone = await record.image("review", "low", "routine")
    assert await record.told() == [
        ("demand", first.image_id),
        ("review", doubt.image_id),
        ("demand", alone.image_id),
    ]
    assert await record.told("review") == [("review", doubt.image_id), ("review", alone.image_id)]
    await record.decide(doubt)
    await record.decide(alone)
    assert await record.told() == [("demand", first.image_id)]


@pytest.mark.parametrize("end", ["failed", "refused"])
async def test_what_can_have_no_answer_is_done_with_by_a_later_image_or_a_decision(record, end: str) -> None:
    await record.care()
    case = await record.image(end, days=1)
    later = await record.image("pending", lesion=case.lesion_id)
    assert await record.told() == [("pending", later.image_id)]
    # An erased image is none.
    await record.erase(later)
    assert await record.told() == [(end, case.image_id)]
    await record.owner.execute(
        "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, impression_diagnosis, before_answer)"
        " VALUES ($1, $2, 'dr', 'r', 'MEL', true)",
        *(uuid4(), case.assessment_id),
    )
    assert await record.told() == [(end, case.image_id)]
    await record.decide(case)
    assert await record.told() == []
    # Where no decision is taken, the lesion's outcome ends it.
    other = await record.image(end, days=1)
    assert await record.told() == [(end, other.image_id)]
    await record.outcome(other)
    assert await record.told() == []


async def test_a_follow_up_waits_until_the_lesion_was_seen_again(record) -> None:
    await record.care()
    day = timedelta(days=1)
    today = datetime.now(UTC).date()
    case = await record.image("decided", days=100)
    # An image from before the decision is no follow-up of it.
    between = await record.image("decided", days=95, lesion=case.lesion_id)
    await record.decide(between)
    await record.decide(case, today - day, days=90)
    (item,) = await record.list()
    assert (item.kind, item.image_id, item.due, item.overdue) == (
        "follow_up",
        case.image_id,
        today - day,
        True,
    )
    assert (item.level, item.action.code) == ("medium", WorkAction.FOLLOW_UP)
    # The newest decision on the assessment counts.
    for due, listed, days in ((today + 15 * day, False, 80), (today + 14 * day, True, 70), (today, True, 60)):
        await record.decide(case, due, days=days)
        assert [(each.due, each.overdue) for each in await record.list()] == (
            [(due, False)] if listed else []
        )
    # One on another assessment takes nothing back, and of two the first is listed.
    await record.decide(between, today + 3 * day, days=50)
    assert [each.due for each in await record.list()] == [today]
    erased = await record.image("decided", days=1, lesion=case.lesion_id)
    assert await record.list("follow_up") == []
    await record.erase(erased)
    assert len(await record.list("follow_up")) == 1
    await record.outcome(case, today - 95 * day)
    assert len(await record.list("follow_up")) == 1
    await record.outcome(case)
    assert await record.list("follow_up") == []


async def test_pages_have_no_gap_and_no_repetition_while_items_come_and_go(record) -> None:
    """By due day, of one day the highest level first; what comes meanwhile moves nothing that was there."""
    await record.care()
    dice = random.Random(4)  # noqa: S311 - repeatable
    there = []
    for _ in range(17):
        level, urgency = dice.choice(LEVELS), dice.choice(URGENCIES)
        there.append(await record.image(dice.choice(ENDS), level, urgency, days=dice.randrange(40)))
    whole = await record.list()
    assert {item.image_id for item in whole} == {case.image_id for case in there}
    assert all(a.place < b.place for a, b in pairwise(whole))
    assert [item.overdue for item in whole] == sorted((item.overdue for item in whole), reverse=True)
    seen, after, gone = [], None, whole[10]
    while page := await record.list(limit=4, after=after):
        seen += page
        after = page[-1].place
        if len(seen) == 4:
            await record.image("failed", days=39.5)
            await record.decide(next(case for case in there if case.image_id == gone.image_id))
    kept = [item.image_id for item in whole if item != gone]
    assert [item.image_id for item in seen if item.image_id in set(kept)] == kept
    assert len({item.place for item in seen}) == len(seen)

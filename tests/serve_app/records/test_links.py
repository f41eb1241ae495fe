"""Lesions that a clinician says are one: shown as one, and each again as it was; no demand is lowered, closed or lost by it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
import random
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from serve_app.audit.events import AuditEvent
from serve_app.domain.errors import Conflict, IdempotencyMismatch, LegalHold, NotFound
from serve_app.erasure.eraser import Eraser
from serve_app.keys.receipts import ErasureReason
from serve_app.records.erasures import ErasureRequest, ErasureStore, Held, HoldStore, Verdict
from serve_app.records.health import find_violations
from serve_app.records.hooks import HookStore
from serve_app.records.lesion_rows import Admission, LesionTimeline
from serve_app.records.lesions import LesionStore
from serve_app.records.pool import Pool, queries
from serve_app.records.reconciliation import reconcile
from serve_app.records.reviews import ReviewStore, Statement
from serve_app.records.worklist import WorklistStore
from tests.serve_app.records.test_reviews import HELD, History, Image, ranks
from tests.serve_app.records.test_reviews import statement as said_of

ACTIONS = {"upload": 8, "late": 2, "review": 5, "erase": 2, "outcome": 1, "link": 7, "unlink": 4}
ACTED = 1_000
DAYS = {"urgent": 14, "expedited": 28, "routine": 126}
NOW = datetime(2026, 6, 1, tzinfo=UTC)


def statement(lesion_id: UUID, earlier: UUID | None = None, **named: Any) -> Statement:
    """What a clinician says of two lesions; without the earlier one, that they are not one."""
    said = {"reason": "images_compared"} | ({} if earlier is None else {"earlier_lesion_id": str(earlier)})
    event = AuditEvent(
        action="unlink" if earlier is None else "link",
        actor="dr",
        outcome="success",
        request_id=str(uuid4()),
        lesion_id=lesion_id,
        detail={"reason": "images_compared"},
    )
    return Statement(lesion_id=lesion_id, said=said, event=event, **named)


@asynccontextmanager
async def caring(owner: Pool, clinician: str, *patients: str) -> AsyncIterator[None]:
    """Have patients in a clinician's care for a time, behind the audit log's back."""
    for patient in patients:
        await owner.execute("INSERT INTO care_assignments VALUES ($1, $2, '2026-01-01')", patient, clinician)
    try:
        yield
    finally:
        await owner.execute("DELETE FROM care_assignments WHERE clinician = $1", clinician)


@dataclass
class Link:
    """A link as the test reckons it; `left`: the images whose demand it left open for both."""

    lesion: UUID
    earlier: UUID
    ended: bool = False
    left: list[Image] = field(default_factory=list)


@dataclass
class LinkedHistory(History):
    """Lesions of two patients, and which of them are one."""

    links: list[Link] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    def patient(self, lesion_id: UUID) -> str:
        return self.lesions[lesion_id][0].admission.patient_id

    def begun(self, lesion_id: UUID) -> tuple[datetime, UUID]:
        return self.lesions[lesion_id][0].admission.created_at, lesion_id

    def head(self, lesion_id: UUID) -> UUID:
        return next(
            (each.earlier for each in self.links if not each.ended and each.lesion == lesion_id), lesion_id
        )

    def same(self, lesion_id: UUID) -> set[UUID]:
        return {each for each in self.lesions if self.head(each) == self.head(lesion_id)}

    def own(self, lesion_id: UUID) -> list[Image]:
        """The images of a lesion and of those that are one with it that demand what nobody has answered."""
        images = [image for each in self.same(lesion_id) for image in self.lesions[each]]
        return [image for image in images if image.demand and not image.answered]

    def open(self, lesion_id: UUID) -> list[Image]:
        same = self.same(lesion_id)
        left = [image for each in self.links if same & {each.lesion, each.earlier} for image in each.left]
        return self.own(lesion_id) + [image for image in left if not image.answered]

    def demanded(self, lesion_id: UUID) -> tuple[int, int] | None:
        demands = [image.demand for image in self.open(lesion_id)]
        return tuple(map(max, *demands, demands[0])) if demands else None

    def refusal_of(self, lesion: UUID, earlier: UUID) -> str | None:
        """What keeps one lesion from being linked to another, if anything does."""
        if self.patient(lesion) != self.patient(earlier):
            return "absent"
        if self.begun(earlier) >= self.begun(lesion):
            return "not_earlier"
        if self.head(lesion) != lesion:
            return "linked"
        if self.head(earlier) != earlier:
            return "not_first"
        return "first_of_others" if len(self.same(lesion)) > 1 else None

    async def link(self, lesion_id: UUID, _: Image) -> None:
        before = [
            each
            for each in self.lesions
            if self.patient(each) == self.patient(lesion_id) and self.begun(each) < self.begun(lesion_id)
        ]
        any_or_fitting = list(self.lesions) if self.chance.random() < 0.3 or not before else before
        earlier = self.chance.choice(any_or_fitting)
        refusal, store = self.refusal_of(lesion_id, earlier), ReviewStore(self.app)
        if refusal is not None:
            self.refused[refusal] = self.refused.get(refusal, 0) + 1
            with pytest.raises(NotFound if refusal == "absent" else Conflict):
                await store.link(statement(lesion_id, earlier))
            return
        demanded = [self.demanded(each) for each in (lesion_id, earlier)]
        self.links.append(Link(lesion_id, earlier))
        _link, demand, _new = await store.link(statement(lesion_id, earlier))
        # Never lower than either was.
        now = (-1, -1) if demand is None else ranks(demand)
        assert all(
            had is None or (max(had[0], now[0]) == now[0] and max(had[1], now[1]) == now[1])
            for had in demanded
        )

    async def unlink(self, lesion_id: UUID, _: Image) -> None:
        store = ReviewStore(self.app)
        link = next((each for each in self.links if not each.ended and each.lesion == lesion_id), None)
        if link is None:
            with pytest.raises(Conflict):
                await store.unlink(statement(lesion_id))
            return
        before = self.demanded(lesion_id)
        link.left = self.open(lesion_id)
        link.ended = True
        await store.unlink(statement(lesion_id))
        # Each with the higher of both.
        assert self.demanded(lesion_id) == self.demanded(link.earlier) == before

    async def hold(self, *lesions: UUID) -> None:
        await super().hold(*lesions)
        records = LesionStore(self.app)
        for lesion_id in lesions:
            timeline = await records.timeline(lesion_id)
            filed = {
                image.admission.image_id: each
                for each in self.same(lesion_id)
                for image in self.lesions[each]
            }
            assert {image.image_id: image.lesion_id for image in timeline.images} == filed
            taken = [image.created_at for image in timeline.images]
            assert taken == sorted(taken, reverse=True)
            assert (timeline.lesion_id, timeline.patient_id) == (lesion_id, self.patient(lesion_id))
            demand = timeline.open_demand
            assert (None if demand is None else ranks(demand)) == self.demanded(lesion_id)
            assert demand is None or demand.lesion_id != lesion_id
            said = [each for each in self.links if self.same(lesion_id) & {each.lesion, each.earlier}]
            shown = {
                (each.lesion_id, each.earlier_lesion_id, each.ended_at is not None) for each in timeline.links
            }
            assert shown == {(each.lesion, each.earlier, each.ended) for each in said}
            assert len(timeline.links) == len(said)

    async def hold_what_waits(self) -> None:
        """Every demand of a lesion or of those that are one with it is in the worklist and on a card, once."""
        expected = {self.head(each): self.own(each) for each in self.lesions}
        worklist = await WorklistStore(self.owner, DAYS).worklist("dr-links", kinds=["demand"], limit=1000)
        cards = [due for patient in ("p-0", "p-1") for due in await HookStore(self.app).due(patient)]
        for shown in (worklist, [due for due in cards if due.kind == "open_demand"]):
            found = {self.head(item.lesion_id): ranks(item) for item in shown}
            assert len(found) == len(shown)
            assert found == {
                head: tuple(map(max, *(each.demand for each in images), images[0].demand))
                for head, images in expected.items()
                if images
            }
        for patient in ("p-0", "p-1"):
            listed = await LesionStore(self.app).patient_lesions(patient, limit=1000)
            linked = {each.lesion_id: each.linked_to or each.lesion_id for each in listed}
            assert linked == {each: self.head(each) for each in self.lesions if self.patient(each) == patient}


@pytest.mark.parametrize("seed", [1])
async def test_a_thousand_actions_and_no_link_lowers_or_loses_a_demand(
    pool, owner_pool, admission, assessment, space, seed
) -> None:
    """Whatever is linked, unlinked, sent, decided and erased in whichever order; the model knows nothing of the statements."""
    chance = random.Random(seed)  # noqa: S311 - the same histories every time

    def of_two_patients(**named: Any) -> Admission:
        return admission(**named, patient_id=f"p-{named['lesion_id'].int % 2}")

    made = {"admission": of_two_patients, "assessment": assessment}
    history = LinkedHistory(pool, owner_pool, made, space, chance)
    async with caring(owner_pool, "dr-links", "p-0", "p-1"):
        for number in range(ACTED):
            lesion_id = await history.act(chance.choices(list(ACTIONS), list(ACTIONS.values()))[0])
            await history.hold(lesion_id)
            if number % 100 == 99:
                await history.hold(*history.lesions)
                await history.hold_what_waits()
    assert [each for each in await find_violations(pool) if each.name in (*HELD, "links_to_a_first")] == []
    assert set(history.refused) == {"absent", "not_earlier", "linked", "not_first", "first_of_others"}
    assert {each.ended for each in history.links} == {True, False}
    assert len(history.links) > 50
    assert (await reconcile(pool)).differences == ()


def shown(timeline: LesionTimeline) -> LesionTimeline:
    return replace(timeline, links=())


async def test_unlinked_each_is_as_it_was(pool, lesions, answered, reviews_of) -> None:
    """Once what it demands is answered; and meanwhile the later one's past is the earlier one's."""
    patient = str(uuid4())
    early = await answered("low", "routine", patient_id=patient, created_at=NOW)
    late = await answered("low", "routine", patient_id=patient, created_at=NOW + timedelta(days=9))
    for case in (early, late):
        await reviews_of.review(said_of(case, decision="accept"))
    space = "lite0.1"
    before = {"before": NOW + timedelta(days=10), "embedding_space": space}

    async def state() -> list[object]:
        told = [shown(await lesions.timeline(case.lesion_id)) for case in (early, late)]
        listed = await lesions.patient_lesions(patient, limit=9)
        return [
            told,
            listed,
            [(await lesions.previous(case.lesion_id, **before)).image_id for case in (early, late)],
        ]

    alone = await state()
    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    for case in (early, late):
        assert [each.image_id for each in (await lesions.timeline(case.lesion_id)).images] == [
            late.image_id,
            early.image_id,
        ]
        assert (await lesions.previous(case.lesion_id, **before)).image_id == late.image_id
    earlier = {"before": late.created_at, "embedding_space": space}
    assert (await lesions.previous(late.lesion_id, **earlier)).image_id == early.image_id
    await reviews_of.unlink(statement(late.lesion_id))
    assert await state() == alone
    assert await lesions.previous(late.lesion_id, **earlier) is None
    # What was compared while they were one is found again: an answer can be replayed. Nobody else's image is.
    found = await lesions.compared(late.lesion_id, early.image_id, embedding_space=space)
    assert found.image_id == early.image_id
    other = await answered()
    assert await lesions.compared(late.lesion_id, other.image_id, embedding_space=space) is None
    assert (await reconcile(pool)).differences == ()


async def test_a_decision_answers_nothing_of_a_linked_lesion(lesions, answered, reviews_of) -> None:
    """So that an unlink has nothing to take back."""
    patient = str(uuid4())
    early = await answered("low", "routine", patient_id=patient, created_at=NOW)
    late = await answered("high", "urgent", patient_id=patient, created_at=NOW + timedelta(days=9))
    _, demand, _ = await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    assert (demand.image_id, demand.lesion_id) == (late.image_id, None)
    there = await lesions.open_demand(early.lesion_id)
    assert (there.level, there.image_id, there.lesion_id) == ("high", late.image_id, late.lesion_id)
    review, demand, _ = await reviews_of.review(said_of(late, decision="accept"))
    assert review.answers == (late.assessment_id,)
    assert (demand.level, demand.image_id, demand.lesion_id) == ("low", early.image_id, early.lesion_id)


async def test_an_unlink_leaves_what_was_open_for_both_open_for_each(lesions, answered, reviews_of) -> None:
    patient = str(uuid4())
    early = await answered("high", "urgent", patient_id=patient, created_at=NOW)
    late = await answered("low", "routine", patient_id=patient, created_at=NOW + timedelta(days=9))
    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    _, demand, _ = await reviews_of.unlink(statement(late.lesion_id))
    assert (demand.level, demand.lesion_id, demand.image_id) == ("high", early.lesion_id, early.image_id)
    # What comes to the earlier one afterwards is its own.
    later = {"lesion_id": early.lesion_id, "new_lesion": False, "patient_id": patient}
    follow_up = await answered("high", "urgent", created_at=NOW + timedelta(days=10), **later)
    await reviews_of.review(said_of(early, decision="accept"))
    assert (await lesions.open_demand(late.lesion_id)).image_id == late.image_id
    assert (await lesions.open_demand(early.lesion_id)).image_id == follow_up.image_id


@pytest.mark.parametrize("round_", range(5))
async def test_two_that_link_crosswise_at_once_make_one_link(pool, answered, reviews_of, round_) -> None:
    patient = str(uuid4())
    cases = [await answered(patient_id=patient, created_at=NOW + timedelta(days=n)) for n in range(4)]
    pairs = [(a.lesion_id, b.lesion_id) for a in cases for b in cases]
    random.Random(round_).shuffle(pairs)  # noqa: S311
    said = [reviews_of.link(statement(*pair)) for pair in pairs]
    said += [reviews_of.unlink(statement(case.lesion_id)) for case in cases[1:]]
    found = await asyncio.gather(*said, return_exceptions=True)
    assert {type(each) for each in found if isinstance(each, Exception)} == {Conflict}
    assert [each for each in await find_violations(pool) if each.name == "links_to_a_first"] == []
    await asyncio.gather(
        *(reviews_of.unlink(statement(case.lesion_id)) for case in cases), return_exceptions=True
    )
    a, b = cases[0].lesion_id, cases[1].lesion_id
    crosswise = [reviews_of.link(statement(*pair)) for pair in ((a, b), (b, a))]
    made = await asyncio.gather(*crosswise, return_exceptions=True)
    assert sorted(isinstance(each, Conflict) for each in made) == [False, True]
    assert (await reconcile(pool)).differences == ()


async def test_a_key_leads_to_one_link_and_to_one_end_of_it(answered, reviews_of) -> None:
    patient = str(uuid4())
    early, late = [await answered(patient_id=patient, created_at=NOW + timedelta(days=n)) for n in range(2)]
    linking = replace(statement(late.lesion_id, early.lesion_id), key=str(uuid4()), request_sha256=b"1" * 32)
    found = await asyncio.gather(*(reviews_of.link(linking) for _ in range(5)))
    assert len({link.link_id for link, _, _ in found}) == 1
    assert sorted(is_new for _, _, is_new in found) == [False] * 4 + [True]
    with pytest.raises(IdempotencyMismatch):
        await reviews_of.link(replace(linking, request_sha256=b"2" * 32))
    ending = replace(statement(late.lesion_id), key=str(uuid4()), request_sha256=b"3" * 32)
    ended = await asyncio.gather(*(reviews_of.unlink(ending) for _ in range(5)))
    assert {link.link_id for link, _, _ in ended} == {found[0][0].link_id}
    assert sorted(is_new for _, _, is_new in ended) == [False] * 4 + [True]
    # Linked anew, the old key still tells of the old link, and ends nothing.
    again, _, _ = await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    old, _, is_new = await reviews_of.unlink(ending)
    assert (old.link_id == again.link_id, is_new, old.ended_by) == (False, False, "dr")
    # What is refused spends no key.
    other = replace(ending, key=str(uuid4()))
    with pytest.raises(Conflict):
        await reviews_of.unlink(replace(other, lesion_id=early.lesion_id))
    assert (await reviews_of.unlink(other))[2]


async def test_what_was_said_is_ended_and_never_changed(answered, reviews_of, owner_pool, pool) -> None:
    patient = str(uuid4())
    early, late, other = [
        await answered(patient_id=each, created_at=NOW + timedelta(days=n))
        for n, each in enumerate((patient, patient, str(uuid4())))
    ]
    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    harms = [
        "UPDATE lesion_links SET reason = 'x'",
        "UPDATE lesion_links SET linked_by = 'x', ended_by = 'x', ended_at = now(), end_reason = 'x', end_request_id = 'x'",
        "DELETE FROM lesion_links",
        "TRUNCATE lesion_links",
    ]
    for harm in harms:
        async with owner_pool.connection() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(harm)
    await reviews_of.unlink(statement(late.lesion_id))
    for harm in (
        *harms,
        "UPDATE lesion_links SET left_open = '{}'",
        "UPDATE lesion_links SET ended_at = now()",
    ):
        async with owner_pool.connection() as connection:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(harm)
    add = (
        "INSERT INTO lesion_links (link_id, lesion_id, earlier_lesion_id, patient_id, reason, linked_by, request_id)"
        " VALUES (gen_random_uuid(), $1, $2, $3, 'x', 'x', 'x')"
    )
    # Not even whoever owns the database links two patients' lesions, and the service itself adds none by hand.
    for of in (patient, other.patient_id):
        with pytest.raises(Conflict):
            await owner_pool.execute(add, late.lesion_id, other.lesion_id, of)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with pool.connection() as connection:
            await connection.execute(add, late.lesion_id, early.lesion_id, patient)


async def test_an_erasure_of_one_leaves_the_link_and_what_it_demanded(
    pool, lesions, answered, reviews_of, admission
) -> None:
    patient = str(uuid4())
    early = await answered("high", "urgent", patient_id=patient, created_at=NOW)
    late = await answered("low", "routine", patient_id=patient, created_at=NOW + timedelta(days=9))
    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    # An image is erased where it is filed, and nowhere else.
    erased = {"image_id": early.image_id, "reason": ErasureReason.PATIENT_REQUEST, "actor": "chief"}
    store = ErasureStore(pool)
    assert await store.accept(ErasureRequest(lesion_id=late.lesion_id, **erased)) is Verdict.ABSENT
    assert await store.accept(ErasureRequest(lesion_id=early.lesion_id, **erased)) is Verdict.ACCEPTED
    timeline = await lesions.timeline(late.lesion_id)
    assert [image.outcome for image in timeline.images] == ["review", "erased"]
    assert timeline.open_demand.image_id == early.image_id
    earlier = {"before": NOW + timedelta(days=10), "embedding_space": "lite0.1"}
    assert (await lesions.previous(early.lesion_id, **earlier)).image_id == late.image_id
    await reviews_of.unlink(statement(late.lesion_id))
    assert await lesions.previous(early.lesion_id, **earlier) is None
    assert await lesions.compared(late.lesion_id, early.image_id, embedding_space="lite0.1") is None
    assert (await lesions.open_demand(late.lesion_id)).image_id == early.image_id
    held = [each for each in await find_violations(pool) if each.name in (*HELD, "links_to_a_first")]
    assert (held, (await reconcile(pool)).differences) == ([], ())


async def test_a_hold_on_a_lesion_holds_what_is_linked_with_it(
    pool, owner_pool, answered, reviews_of
) -> None:
    patient = str(uuid4())
    early, late = [await answered(patient_id=patient, created_at=NOW + timedelta(days=n)) for n in range(2)]
    hold = await HoldStore(owner_pool).set(Held(lesion_id=early.lesion_id), reason="case", actor="op")
    request = ErasureRequest(
        lesion_id=late.lesion_id, image_id=late.image_id, reason=ErasureReason.RETENTION, actor="chief"
    )
    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    with pytest.raises(LegalHold):
        await Eraser(ErasureStore(pool), None).erase(request)
    await HoldStore(owner_pool).release(hold, actor="op")
    assert await ErasureStore(pool).accept(request) is Verdict.ACCEPTED


async def test_whoever_saw_a_linked_lesion_was_given_its_answer(answered, reviews_of, lesions) -> None:
    patient, clinician = str(uuid4()), f"dr-{uuid4().hex[:8]}"
    early, late, third = [
        await answered(actor="nurse", patient_id=patient, created_at=NOW + timedelta(days=n))
        for n in range(3)
    ]

    async def given(case: Admission) -> bool:
        asked = queries("reviews")["given"], clinician, case.assessment_id
        return bool(await reviews_of._pool.fetchval(*asked))

    await reviews_of.link(statement(late.lesion_id, early.lesion_id))
    await reviews_of.link(statement(third.lesion_id, early.lesion_id))
    assert not await given(late)
    event = AuditEvent(
        action="read",
        actor=clinician,
        outcome="success",
        request_id="r",
        patient_id=patient,
        lesion_id=third.lesion_id,
    )
    await lesions.record_event(event)
    assert [await given(case) for case in (early, late, third)] == [True] * 3
    await reviews_of.unlink(statement(late.lesion_id))
    assert await given(late)
    other = await answered(actor="nurse", patient_id=patient)
    assert not await given(other)


async def test_a_follow_up_is_done_by_an_image_of_a_linked_lesion_and_waits_again_without(
    owner_pool, answered, reviews_of, pool
) -> None:
    patient, clinician = str(uuid4()), f"dr-{uuid4().hex[:8]}"
    early = await answered("low", "routine", patient_id=patient, created_at=NOW)
    await reviews_of.review(said_of(early, decision="accept", follow_up_by="2026-06-20"))
    late = await answered("low", "routine", patient_id=patient)
    await reviews_of.review(said_of(late, decision="accept"))

    async def waiting() -> list[str]:
        items = await WorklistStore(pool, DAYS).worklist(clinician, limit=9)
        due = [each for each in await HookStore(pool).due(patient) if each.kind == "follow_up"]
        assert bool(due) == bool(items)
        return [item.kind.value for item in items]

    async with caring(owner_pool, clinician, patient):
        assert await waiting() == ["follow_up"]
        await reviews_of.link(statement(late.lesion_id, early.lesion_id))
        assert await waiting() == []
        await reviews_of.unlink(statement(late.lesion_id))
        assert await waiting() == ["follow_up"]


@pytest.fixture
def reviews_of(pool) -> ReviewStore:
    return ReviewStore(pool)

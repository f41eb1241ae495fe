"""The counts that reports are made of are those of a recount, whatever happened in between and whenever they were brought up to date."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
import random
from uuid import UUID, uuid4

import pytest

from serve_app.domain.assessment import Classification, Outcome, Risk, RiskLevel, Urgency
from serve_app.domain.diagnosis import MALIGNANT, Diagnosis
from serve_app.domain.patient import AnatomSite, ClinicalContext, Sex
from serve_app.records.lesions import LesionStore
from serve_app.records.reports import ReportStore

TABLES = ("outcome", "diagnosis", "level", "urgency", "site", "age_band", "intended", "decision", "result")


@dataclass
class Image:
    """What the test remembers of an image; `frozen` once it is erased."""

    case: object
    at: datetime
    model: str | None = None
    outcome: str = "pending"
    top: str | None = None
    risk: Risk | None = None
    intended: str | None = None
    made: bool | None = None
    frozen: tuple | None = None


@dataclass
class History:
    """Lesions and what happened to them, beside the database."""

    lesions: dict[UUID, list[Image]] = field(default_factory=dict)
    outcomes: dict[UUID, list[tuple]] = field(default_factory=dict)
    flows: Counter = field(default_factory=Counter)

    def truth(self, lesion: UUID, image: Image) -> str:
        """The newest histology, else the newest follow-up, of the image's day or later."""
        said = [
            each for each in self.outcomes.get(lesion, ()) if each[1] >= image.at.date() - timedelta(days=1)
        ]
        said = [each for each in said if each[3] is not None]
        return max(said, key=lambda each: each[:3])[3] if said else "unknown"

    def is_index(self, lesion: UUID, image: Image) -> bool:
        """The lesion's first answer by its model; one that was erased as such remains it."""
        if image.model is None or image.outcome not in {"decided", "review"}:
            return False
        others = [each for each in self.lesions[lesion] if each.model == image.model]
        if any(each.frozen and each.frozen[0] for each in others):
            return False
        alive = [each for each in others if not each.frozen and each.outcome in {"decided", "review"}]
        first = min(alive, key=lambda each: (each.at, each.case.assessment_id))
        return first is image

    def recount(self) -> Counter:
        """Every cell, counted from the whole of the history."""
        cells = Counter(self.flows)
        for lesion, images in self.lesions.items():
            for image in images:
                if image.frozen:
                    cells.update(image.frozen[1])
                elif image.outcome != "pending":
                    cells.update(self.cells_of(lesion, image))
        return cells

    def cells_of(self, lesion: UUID, image: Image) -> list[tuple]:
        """The cells of one image."""
        month = image.at.date().replace(day=1)
        keys: list[tuple] = [("outcome", (image.outcome,))]
        if image.top:
            keys.append(("diagnosis", (image.top,)))
        if image.risk:
            keys += [("level", (image.risk.level.value,)), ("urgency", (image.risk.urgency.value,))]
        if self.is_index(lesion, image):
            refer = image.risk.level == "high" or image.risk.urgency == "urgent"
            action, truth = "refer" if refer else "not", self.truth(lesion, image)
            age = image.case.context.age_approx
            band = (
                "unknown"
                if age is None
                else "0-19"
                if age < 20
                else "80+"
                if age >= 80
                else f"{age // 10 * 10}-{age // 10 * 10 + 9}"
            )
            site = image.case.context.anatom_site_general
            keys += [
                ("site", (image.model, action, truth, site.value if site else "unknown")),
                ("age_band", (image.model, action, truth, band)),
            ]
            if image.intended:
                made = "unknown" if image.made is None else str(image.made).lower()
                keys.append(
                    ("intended", (image.model, image.intended, image.risk.level.value, made, action, truth))
                )
        return [(table, month, key) for table, key in keys]


@dataclass
class World:
    """A history that happens in the database as well."""

    records: LesionStore
    reports: ReportStore
    owner: object
    admission: object
    assessment: object
    event: object
    space: str
    random: random.Random
    history: History = field(default_factory=History)

    def moment(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=self.random.uniform(0, 120))

    async def admit(self) -> None:
        known = list(self.history.lesions)
        lesion = self.random.choice(known) if known and self.random.random() < 0.5 else uuid4()
        age = self.random.choice([None, 3, 19, 20, 59, 60, 79, 80, 99])
        context = ClinicalContext(self.random.choice([None, *AnatomSite]), age, Sex.FEMALE)
        image = Image(
            self.admission(lesion_id=lesion, new_lesion=lesion not in known, context=context), self.moment()
        )
        await self.records.admit(image.case)
        # The record's own times: this history takes months.
        moved = "UPDATE assessments SET created_at = $2 WHERE assessment_id = $1"
        await self.owner.execute(moved, image.case.assessment_id, image.at)
        self.history.lesions.setdefault(lesion, []).append(image)

    def pick(self, *, ended: bool, answered: bool = False) -> tuple[UUID, Image] | None:
        found = [
            (lesion, image)
            for lesion, images in self.history.lesions.items()
            for image in images
            if not image.frozen and (image.outcome != "pending") == ended and (image.model or not answered)
        ]
        return self.random.choice(found) if found else None

    async def finish(self) -> None:
        if (found := self.pick(ended=False)) is None:
            return
        image = found[1]
        assessment_id, done = image.case.assessment_id, {"event": self.event("classify")}
        kind = self.random.choice(["decided", "decided", "review", "refused", "failed"])
        if kind == "failed":
            await self.records.fail(assessment_id, "integrity", **done)
        else:
            top = self.random.choice(list(Diagnosis))
            level, urgency = self.random.choice(list(RiskLevel)), self.random.choice(list(Urgency))
            risk = replace(self.assessment().risk, level=level, urgency=urgency)
            probabilities = dict.fromkeys(Diagnosis, 0.05) | {top: 0.6}
            model = self.random.choice(["lite0.a", "lite0.b"])
            nothing = {"classification": None, "risk": None, "embedding": None} if kind == "refused" else {
                "classification": Classification(probabilities, (top,), 0.95, 3.0), "risk": risk
            }  # fmt: skip
            answer = self.assessment(
                outcome=Outcome(kind),
                provenance=replace(self.assessment().provenance, model_id=model),
                **nothing,
            )
            await self.records.complete(assessment_id, answer, embedding_space=self.space, **done)
            image.model = model
            if kind != "refused":
                image.top, image.risk = top.value, risk
        image.outcome = kind
        moved = "UPDATE assessments SET completed_at = $2 WHERE assessment_id = $1"
        await self.owner.execute(moved, assessment_id, image.at)

    async def review(self) -> None:
        if (found := self.pick(ended=True)) is None:
            return
        image, at = found[1], self.moment()
        decision = self.random.choice([None, "accept", "override"])
        intended = self.random.choice([None, "none", "routine", "urgent"]) if decision else "expedited"
        before = self.random.random() < 0.7 if intended else None
        made = self.random.choice([None, True, False]) if decision else None
        await self.owner.execute(
            "INSERT INTO reviews (review_id, assessment_id, clinician, request_id, recorded_at, decision, reason,"
            " referral_made, intended_referral, before_answer) VALUES ($1, $2, 'dr', 'r', $3, $4, $5, $6, $7, $8)",
            *(uuid4(), image.case.assessment_id, at, decision),
            *("other" if decision == "override" else None, made, intended, before),
        )
        self.said.setdefault(id(image), []).append((at, intended if before else None, made))
        told = sorted(self.said[id(image)], key=lambda each: each[0])
        image.intended = next((each[1] for each in told if each[1]), None)
        image.made = next((each[2] for each in reversed(told) if each[2] is not None), None)
        if decision:
            key = (decision, "other" if decision == "override" else "")
            self.history.flows["decision", at.date().replace(day=1), key] += 1

    said: dict[int, list[tuple]] = field(default_factory=dict)

    async def turn_out(self) -> None:
        lesion, at = self.random.choice(list(self.history.lesions)), self.moment()
        kind = self.random.choice(["histology", "follow_up"])
        diagnosis = self.random.choice([None, *Diagnosis])
        malignant = (
            self.random.choice([None, True, False]) if diagnosis else self.random.choice([True, False])
        )
        observed = self.moment().date()
        await self.owner.execute(
            "INSERT INTO lesion_outcomes (outcome_id, lesion_id, kind, diagnosis, malignant, observed_on, source,"
            " recorded_by, request_id, recorded_at) VALUES ($1, $2, $3, $4, $5, $6, 'registry', 'dr', 'r', $7)",
            *(uuid4(), lesion, kind, diagnosis and diagnosis.value, malignant, observed, at),
        )
        bad = malignant if malignant is not None else diagnosis in MALIGNANT
        known = malignant is not None or diagnosis is not Diagnosis.UNK
        truth = (
            None
            if not known
            else "benign"
            if not bad
            else "melanoma"
            if diagnosis is Diagnosis.MEL
            else "other_malignant"
        )
        self.history.outcomes.setdefault(lesion, []).append((kind == "histology", observed, at, truth))
        self.history.flows["result", at.date().replace(day=1), (kind, truth or "unknown")] += 1

    async def erase(self) -> None:
        if (found := self.pick(ended=self.random.random() < 0.7)) is None:
            return
        lesion, image = found
        if image.outcome == "pending":
            image.outcome = "cancelled"
        image.frozen = self.history.is_index(lesion, image), self.history.cells_of(lesion, image)
        erase = "SELECT erase_image($1, $2, $3, 'patient_request', NULL, 'boss', 'r')"
        assert await self.owner.fetchval(erase, lesion, image.case.image_id, uuid4()) == "accepted"
        if image.outcome == "cancelled":
            moved = "UPDATE assessments SET completed_at = $2 WHERE assessment_id = $1"
            await self.owner.execute(moved, image.case.assessment_id, image.at)

    async def hold(self) -> None:
        """The database's counts against the recount."""
        await self.reports.count()
        rows = await self.owner.fetch("SELECT tab, month, key, n FROM report_cells WHERE n <> 0")
        counted = {(row["tab"], row["month"], tuple(row["key"])): row["n"] for row in rows}
        counted = {cell: n for cell, n in counted.items() if cell[0] in TABLES}
        assert counted == +self.history.recount()


@pytest.fixture
async def world(pool, owner_pool, lesions, admission, assessment, event, space):
    async def make(seed: int) -> World:
        async with owner_pool.connection() as connection:
            await connection.execute("TRUNCATE report_queue, report_cells, assessment_facts")
        parts = (admission, assessment, event, space, random.Random(seed))  # noqa: S311 - no secret
        return World(lesions, ReportStore(pool), owner_pool, *parts)

    return make


@pytest.mark.parametrize("seed", range(3))
async def test_counts_are_those_of_a_recount_after_any_history(world, seed: int) -> None:
    """Uploads, answers out of order, words, outcomes that contradict, erasures: counted at random moments."""
    world = await world(seed)
    await world.admit()
    steps = [world.admit, world.finish, world.finish, world.review, world.turn_out, world.erase]
    for number in range(400):
        await world.random.choices(steps, (6, 6, 6, 4, 4, 1))[0]()
        if world.random.random() < 0.15:
            await world.reports.count()
        if number % 80 == 79:
            await world.hold()
    assert sum(world.history.recount().values()) > 300


async def test_many_counters_count_each_once_while_images_end_and_are_erased(world) -> None:
    world = await world(11)
    done = asyncio.Event()

    async def count_on() -> None:
        while not done.is_set():
            await world.reports.count()
            await asyncio.sleep(0)

    counters = [asyncio.create_task(count_on()) for _ in range(3)]
    for _ in range(80):
        for step in (world.admit, world.finish, world.review, world.turn_out):
            if step == world.admit or world.history.lesions:
                await step()
        if world.random.random() < 0.3:
            await world.erase()
        await asyncio.sleep(0)
    done.set()
    await asyncio.gather(*counters)
    # The days were moved after each answer, perhaps once it was counted: held is what does not depend on them.
    await world.reports.count()
    tables = ["outcome", "diagnosis", "level", "urgency", "decision", "result"]
    rows = await world.owner.fetch(
        "SELECT tab, key, sum(n) AS n FROM report_cells WHERE tab = ANY($1) GROUP BY 1, 2", tables
    )
    wanted: Counter = Counter()
    for (table, _, key), n in world.history.recount().items():
        wanted[table, key] += n if table in tables else 0
    assert Counter({(row["tab"], tuple(row["key"])): int(row["n"]) for row in rows}) == +wanted
    assert await world.owner.fetchval("SELECT count(*) FROM report_queue") == 0


async def test_of_an_erased_image_only_the_counts_stay(world) -> None:
    world = await world(5)
    for _ in range(4):
        await world.admit()
        await world.finish()
    await world.hold()
    await world.erase()
    (row,) = await world.owner.fetch("SELECT * FROM assessment_facts WHERE outcome = 'erased'")
    kept = {name for name, value in row.items() if value is not None}
    assert kept <= {
        "position",
        "assessment_id",
        "created_on",
        "completed_on",
        "outcome",
        "model_id",
        "is_index",
    }
    await world.hold()


async def test_a_fact_names_no_patient_and_holds_no_text_or_vector(owner_pool) -> None:
    columns = await owner_pool.fetch(
        "SELECT attname, format_type(atttypid, NULL) AS type FROM pg_attribute"
        " WHERE attrelid = 'assessment_facts'::regclass AND attnum > 0 AND NOT attisdropped"
    )
    types = {row["attname"]: row["type"] for row in columns}
    assert not {"patient_id", "lesion_id", "image_id", "encounter_id", "actor", "note"} & set(types)
    assert not {"halfvec", "jsonb", "bytea", "timestamp with time zone"} & set(types.values())


async def test_published_reports_are_only_added(pool, owner_pool) -> None:
    reports = ReportStore(pool)
    first = await reports.keep("summary", "2026-01", {"a": 1})
    assert await reports.keep("summary", "2026-01", {"a": 2}) == first
    assert first.document == {"a": 1}
    for statement in ("UPDATE report_snapshots SET document = '{}'", "DELETE FROM report_snapshots"):
        with pytest.raises(Exception, match="append-only"):
            await owner_pool.execute(statement)

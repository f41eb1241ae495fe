"""Drift in the database: collected, frozen, found once, acknowledged on record, and nothing kept of an image."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
import json
import os
from uuid import uuid4

import asyncpg
import numpy as np
from pgvector import HalfVector
import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, NotFound
from serve_app.records.drift import Cause, DriftStore
from serve_app.records.pool import open_pool, queries
from serve_app.records.serving import LiveModel, publish
from serve_app.reports.drift import BASELINE, WINDOW
from serve_app.reports.drift_watch import DriftWatch, drift_document

START = datetime(2026, 1, 1, tzinfo=UTC)
MODELS = {"a.1": "space.a", "b.1": "space.b"}


class Clinic:
    """Images that were answered, a minute after another."""

    def __init__(self, owner) -> None:
        self.owner, self.rng, self.now = owner, np.random.default_rng(1), START

    async def answer(
        self, count: int, *, model_id: str = "a.1", exposure: float = 0.6, policy: str = "p1"
    ) -> None:
        lesions, images, assessments, embeddings = [], [], [], []
        for number in range(count):
            self.now += timedelta(minutes=1)
            lesion_id, image_id, patient = uuid4(), uuid4(), f"PATIENT-{number // 2}"
            lesions.append((lesion_id, patient, self.now))
            images.append((image_id, lesion_id, patient, self.now, uuid4(), os.urandom(8)))
            assessments.append((uuid4(), image_id, self.now, self._answer(model_id, exposure, policy)))
            vector = self.rng.normal(size=512)
            embeddings.append((image_id, MODELS[model_id], HalfVector(vector / np.linalg.norm(vector))))
        async with self.owner.connection() as connection:
            await connection.executemany("INSERT INTO lesions VALUES ($1, $2, $3)", lesions)
            await connection.executemany(
                "INSERT INTO lesion_images (image_id, lesion_id, patient_id, created_at, content_type, width, height,"
                " data_key_id, sealed) VALUES ($1, $2, $3, $4, 'image/png', 300, 300, $5, $6)",
                images,
            )
            await connection.executemany(
                "INSERT INTO assessments (assessment_id, image_id, created_at, outcome, answer, completed_at, context,"
                " top_k, licences, actor, request_id) VALUES ($1, $2, $3, 'decided', $4, $3, '{}', 10, '{}', 'dr', 'r')",
                assessments,
            )
            await connection.executemany("INSERT INTO lesion_embeddings VALUES ($1, $2, $3)", embeddings)

    def _answer(self, model_id: str, exposure: float, policy: str) -> dict[str, object]:
        nine = self.rng.dirichlet(np.ones(9))
        quality = {
            name: self.rng.uniform(5, 9) for name in ("sharpness", "contrast", "colour", "red", "blue")
        }
        return {
            "version": 1,
            "outcome": "decided",
            "quality": {**quality, "exposure": exposure + 0.1 * self.rng.normal(), "damaged": None},
            "classification": {"probabilities": dict(zip(map(str, Diagnosis), nine.tolist(), strict=True))},
            "risk": {"level": str(self.rng.choice(["low", "high"]))},
            "provenance": {
                "model_id": model_id,
                "model_digest": "d",
                "embedding_space": MODELS[model_id],
                "preprocess_version": "2",
                "policy_version": policy,
                "service_version": "1",
            },
        }


@pytest.fixture(scope="module")
async def fresh(new_database):
    """A database of its own for a test: what came before decides what is found."""

    async def make():
        urls = await new_database()
        pools = [await open_pool(url, minimum=0, maximum=2, timeout_s=20) for url in (urls.owner, urls.app)]
        opened.extend(pools)
        for model_id, space in MODELS.items():
            await publish(pools[0], LiveModel(model_id, "d", space))
        # The images below are from before that.
        return (*pools, Clinic(pools[0]))

    opened = []
    yield make
    for pool in opened:
        await pool.close()


@pytest.fixture
def small(monkeypatch) -> None:
    """Fewer images for a baseline and a look, where how many there are is not what is asked."""
    for name, count in (("BASELINE", 100), ("WINDOW", 50)):
        monkeypatch.setattr(f"serve_app.reports.drift_watch.{name}", count)


async def states(pool) -> dict[str, str]:
    document = drift_document(await DriftStore(pool).current())
    return {measure.measure: measure.state for stream in document.streams for measure in stream.measures}


async def test_from_the_first_image_to_an_alarm_that_is_acknowledged_and_over(fresh, caplog) -> None:
    owner, app, clinic = await fresh()
    clinic.now = datetime.now(UTC)
    watch, store = DriftWatch(app), DriftStore(owner)
    await watch.look()
    assert drift_document(await store.current()).streams == []

    await clinic.answer(BASELINE - 1)
    await watch.look()
    document = drift_document(await store.current())
    assert [stream.collected for stream in document.streams] == [BASELINE - 25] * 3
    assert set((await states(app)).values()) == {"collecting"}

    await clinic.answer(WINDOW + 1)
    await watch.look()
    assert set((await states(app)).values()) == {"quiet"}
    assert (watch.findings(), watch.counts()) == ([], {"alarms": 0})
    first = [stream.baseline for stream in await store.current()]

    await clinic.answer(WINDOW, exposure=0.5)
    for _ in range(2):
        await watch.look()
    assert {name for name, state in (await states(app)).items() if state == "alarm"} == {"exposure"}
    assert "exposure" in watch.findings()[0]
    assert watch.counts() == {"alarms": 1}
    assert sum("drift: exposure" in line for line in caplog.messages) == 1
    assert [stream.baseline for stream in await store.current()] == first

    with pytest.raises(NotFound):
        await store.acknowledge("contrast", Cause.OTHER, actor="os:op", begin_again=False)
    await store.acknowledge("exposure", Cause.NEW_LIGHT, actor="os:op", begin_again=False)
    with pytest.raises(Conflict):
        await store.acknowledge("exposure", Cause.NEW_LIGHT, actor="os:op", begin_again=False)
    event = await owner.fetchrow("SELECT actor, detail FROM audit_events WHERE action = 'drift_acknowledge'")
    assert event["actor"] == "os:op"
    wanted = {"measure": "exposure", "reason": "new_light", "begin_again": False}
    assert {name: event["detail"][name] for name in wanted} == wanted
    await watch.look()
    assert (await states(app))["exposure"] == "acknowledged"
    assert watch.findings() == []

    await clinic.answer(WINDOW)
    await watch.look()
    assert (await states(app))["exposure"] == "quiet"

    # Not acknowledged, it stands even when the light is as before.
    await clinic.answer(WINDOW, exposure=0.5)
    await watch.look()
    await clinic.answer(WINDOW)
    await watch.look()
    assert (await states(app))["exposure"] == "alarm"
    await store.acknowledge("exposure", Cause.PUT_RIGHT, actor="os:op", begin_again=True)
    begun = {name: state for name, state in (await states(app)).items() if state == "collecting"}
    assert set(begun) == {"exposure", "contrast", "colour", "colour_balance"}


async def test_another_model_begins_anew_but_for_the_pictures(fresh, small) -> None:
    owner, app, clinic = await fresh()
    clinic.now = datetime.now(UTC)
    watch, store = DriftWatch(app), DriftStore(owner)
    await clinic.answer(150)
    await watch.look()
    await clinic.answer(25, model_id="b.1", policy="p2")
    await watch.look()
    streams = {stream.stream: stream for stream in drift_document(await store.current()).streams}
    assert streams["pictures"].collected == 150
    assert {streams[name].collected for name in ("model", "answers")} == {25}
    assert streams["model"].subject["model_id"] == "b.1"
    # Back: the model's own baseline is still there.
    await clinic.answer(1)
    await watch.look()
    streams = {stream.stream: stream for stream in drift_document(await store.current()).streams}
    assert (streams["model"].subject["model_id"], streams["model"].collected) == ("a.1", 150)
    # Another policy: levels and outcomes alone.
    await clinic.answer(25, policy="p2")
    await watch.look()
    streams = {stream.stream: stream for stream in drift_document(await store.current()).streams}
    assert (streams["model"].collected, streams["answers"].collected) == (150, 25)


async def test_one_replica_looks_at_a_time_and_only_once_enough_images_have_come(fresh) -> None:
    owner, app, clinic = await fresh()
    clinic.now = datetime.now(UTC)
    watches = [DriftWatch(app), DriftWatch(app)]
    await clinic.answer(30)
    async with DriftStore(app).look() as mine:
        assert mine is not None
        await watches[0].look()
        assert await owner.fetchval("SELECT count(*) FROM drift_streams") == 0
    await asyncio.gather(*(watch.look() for watch in watches))
    before = await owner.fetch("SELECT stream, looked_at FROM drift_streams ORDER BY stream")
    assert [row["stream"] for row in before] == ["answers", "model", "pictures"]
    await clinic.answer(24)
    await watches[0].look()
    assert await owner.fetch("SELECT stream, looked_at FROM drift_streams ORDER BY stream") == before
    await clinic.answer(1)
    await watches[0].look()
    assert await owner.fetch("SELECT stream, looked_at FROM drift_streams ORDER BY stream") != before


async def test_nothing_is_kept_of_a_patient_and_an_erased_image_is_in_no_new_mean(fresh, small) -> None:
    owner, app, clinic = await fresh()
    clinic.now = datetime.now(UTC)
    watch = DriftWatch(app)
    await clinic.answer(99)
    await watch.look()
    assert await owner.fetchval("SELECT count(*) FROM drift_streams WHERE baseline IS NOT NULL") == 0
    await owner.execute("UPDATE assessments SET answer = NULL, outcome = 'erased'")
    await clinic.answer(150)
    await watch.look()
    streams = await DriftStore(app).current()
    assert [stream.collected for stream in streams] == [150] * 3
    kept = json.dumps([(stream.baseline, stream.newest, stream.subject) for stream in streams], default=str)
    assert "PATIENT" not in kept
    assert all(found["images"] == 100 for stream in streams for found in stream.baseline.values())
    text = drift_document(streams).model_dump_json()
    assert "covariance" not in text
    assert "PATIENT" not in text


@pytest.mark.parametrize("query", ["first_images", "newest_images"])
async def test_a_look_reads_no_further_than_it_needs(fresh, query: str) -> None:
    """By the index, in its order: however many answers there are, and whatever the planner takes them for."""
    owner, app, clinic = await fresh()
    await clinic.answer(400)
    await owner.execute("ANALYZE")
    async with app.connection() as connection, connection.transaction():
        assert await connection.fetchval(queries("drift")["try_to_look"])
        explained = await connection.fetch(
            f"EXPLAIN (ANALYZE, COSTS OFF) {queries('drift')[query]}", "model", {"model_id": "a.1"}, START, 50
        )
    plan = "\n".join(line[0] for line in explained)
    (scan,) = [line for line in plan.splitlines() if "using assessments_answered" in line]
    assert "rows=50." in scan, plan
    assert "Sort" not in plan


@pytest.mark.parametrize(
    ("statement", "owner_may"),
    [
        ("UPDATE drift_streams SET baseline = '{}'", False),
        ("UPDATE drift_streams SET baseline = NULL, baseline_until = NULL", False),
        ("UPDATE drift_alarms SET acknowledged_at = now(), acknowledged_by = 'x', reason = 'other'", True),
        (
            "INSERT INTO drift_streams (stream, subject, since, begun_by) VALUES ('model', '{}', now(), 'x')",
            True,
        ),
        ("DELETE FROM drift_alarms", True),
    ],
)
async def test_a_baseline_is_frozen_and_only_the_owner_acknowledges(
    pool, owner_pool, statement: str, *, owner_may: bool
) -> None:
    await owner_pool.execute(
        "INSERT INTO drift_streams (stream, subject, since, baseline, baseline_until)"
        """ VALUES ('model', '{}', now(), '{"x": 1}', now())"""
    )
    refused = asyncpg.InsufficientPrivilegeError
    with pytest.raises(refused):
        await pool.execute(statement)
    if owner_may:
        await owner_pool.execute(statement)
    else:
        with pytest.raises(refused):
            await owner_pool.execute(statement)


async def test_no_alarm_ends_that_nobody_acknowledged(pool, owner_pool) -> None:
    begin = (
        "INSERT INTO drift_streams (stream, subject, since) VALUES ('model', '{}', now()) RETURNING drift_id"
    )
    drift_id = await pool.fetchval(begin)
    await pool.execute(
        "INSERT INTO drift_alarms (drift_id, measure, distance) VALUES ($1, 'unknown', 9)", drift_id
    )
    with pytest.raises(Conflict, match="until_acknowledged"):
        await owner_pool.execute("UPDATE drift_alarms SET ended_at = now() WHERE drift_id = $1", drift_id)


async def test_the_report_is_for_statistics_readers_and_says_how_each_measure_stands(service) -> None:
    found = '{"exposure": {"mean": [0.6], "distance": 41.234, "shown": {"exposure": 0.6}}}'
    drift_id = await service.owner.fetchval(
        "INSERT INTO drift_streams (stream, subject, since, collected, baseline, baseline_until, newest) VALUES"
        """ ('pictures', '{"preprocess_version": "0"}', now(), 803, $1::text::jsonb, now(), $1::text::jsonb)"""
        " RETURNING drift_id",
        found,
    )
    await service.owner.execute(
        "INSERT INTO drift_alarms (drift_id, measure, distance, acknowledged_at, acknowledged_by, reason)"
        " VALUES ($1, 'exposure', 41, now(), 'os:somebody', 'new_light')",
        drift_id,
    )
    response = await service.client.get("/api/reports/drift", headers=service.token("ops", ("operator",)))
    await service.hold_to_event(response, "view_statistics", "success", report="drift")
    assert response.headers["cache-control"] == "no-store"
    # The service itself looks now and then, and has streams of its own.
    (stream,) = [each for each in response.json()["streams"] if each["collected"] == 800]
    assert (stream["stream"], stream["needed"]) == ("pictures", BASELINE + WINDOW)
    exposure, contrast = stream["measures"][:2]
    assert (exposure["measure"], exposure["state"], exposure["distance"]) == (
        "exposure",
        "acknowledged",
        41.2,
    )
    assert (exposure["newest"], exposure["reason"]) == ({"exposure": 0.6}, "new_light")
    assert exposure["meaning"]
    assert (contrast["state"], contrast["newest"], contrast["meaning"]) == ("collecting", None, None)
    assert "os:somebody" not in response.text
    await service.owner.execute("DELETE FROM drift_alarms")
    await service.owner.execute("DELETE FROM drift_streams")

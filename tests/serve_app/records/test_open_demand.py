"""The open demand of a lesion never falls, whatever comes after; and what was recorded before it was kept has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
import json
from pathlib import Path
import shutil
from typing import Any
from uuid import uuid4

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from serve_app.domain.assessment import Outcome, Reason, RiskLevel, Urgency
from serve_app.records.migrate import MIGRATIONS, migrate

LEVELS, URGENCIES = list(RiskLevel), list(Urgency)
ENDS = ("answered", "refused", "refused, referred", "failed", "pending")
IMAGES = st.lists(
    st.tuples(st.sampled_from(ENDS), st.sampled_from(LEVELS), st.sampled_from(URGENCIES), st.booleans()),
    min_size=1,
    max_size=6,
)


def ranks(demand) -> tuple[int, int]:
    return (-1, -1) if demand is None else (LEVELS.index(demand.level), URGENCIES.index(demand.urgency))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(images=IMAGES)
async def test_the_open_demand_never_falls(
    lesions, owner_pool, admission, assessment, event, space, images
) -> None:
    """Images end in every way, erased or not: after each step the demand is the highest so far."""
    lesion_id, highest = uuid4(), (-1, -1)
    for n, (end, level, urgency, erased) in enumerate(images):
        case = admission(lesion_id=lesion_id, new_lesion=n == 0)
        await lesions.admit(case)
        assert ranks(await lesions.open_demand(lesion_id)) == highest
        done = {"embedding_space": space, "event": event("classify")}
        if end == "answered":
            risk = replace(assessment().risk, level=level, urgency=urgency)
            await lesions.complete(case.assessment_id, assessment(risk=risk), **done)
        elif end.startswith("refused"):
            code = "checklist_demands_referral" if "referred" in end else "blurred"
            nothing = {"classification": None, "risk": None, "embedding": None}
            refusal = assessment(outcome=Outcome.REFUSED, reasons=(Reason(code, "m", "a"),), **nothing)
            await lesions.complete(case.assessment_id, refusal, **done)
        elif end == "failed":
            await lesions.fail(case.assessment_id, "integrity", event=event("classify"))
        demanded = {"answered": (LEVELS.index(level), URGENCIES.index(urgency)), "refused, referred": (2, 2)}
        highest = tuple(map(max, highest, demanded.get(end, (-1, -1))))
        if erased:
            erase = "SELECT erase_image($1, $2, $3, 'patient_request', NULL, 'boss', 'r')"
            assert await owner_pool.fetchval(erase, lesion_id, case.image_id, uuid4()) == "accepted"
        found = await lesions.open_demand(lesion_id)
        assert ranks(found) == highest
        timeline = await lesions.timeline(lesion_id)
        assert timeline.open_demand == found
        assert found is None or found.image_id in {image.image_id for image in timeline.images}


async def test_a_demand_is_closed_by_its_answer_alone(
    lesions, owner_pool, admission, assessment, event, space
) -> None:
    first = admission()
    later = admission(lesion_id=first.lesion_id, new_lesion=False)
    low = replace(assessment().risk, level=RiskLevel.LOW, urgency=Urgency.ROUTINE)
    for case, risk in ((first, assessment().risk), (later, low)):
        await lesions.admit(case)
        done = {"embedding_space": space, "event": event("classify")}
        await lesions.complete(case.assessment_id, assessment(risk=risk), **done)
    assert (await lesions.open_demand(first.lesion_id)).image_id == first.image_id
    for change in (
        "demand_level = 'low', demand_urgency = 'routine'",
        "demand_level = NULL, demand_urgency = NULL",
    ):
        for pool in (lesions._pool, owner_pool):
            async with pool._pool.acquire() as connection:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(f"UPDATE assessments SET {change}")  # noqa: S608 - our own
    answer = "UPDATE assessments SET demand_answered_at = now() WHERE assessment_id = $1"
    await owner_pool.execute(answer, first.assessment_id)
    assert ranks(await lesions.open_demand(first.lesion_id)) == (0, 0)
    await owner_pool.execute(answer, later.assessment_id)
    assert await lesions.open_demand(first.lesion_id) is None


async def test_what_is_on_record_from_before_demands_too(new_database, tmp_path: Path, assessment) -> None:
    """The migration reads the demands out of the answers that there are."""
    early = tmp_path / "early"
    early.mkdir()
    for path in MIGRATIONS.glob("*.sql"):
        if path.name < "0016":
            shutil.copy(path, early)
    urls = await new_database(migrated=False)
    await migrate(urls.owner, application_role=None, directory=early)
    connection = await asyncpg.connect(urls.owner)
    lesion, refused = uuid4(), uuid4()
    reasons = [{"code": "checklist_demands_referral"}]
    answers = {
        lesion: {"reasons": [], "risk": {"level": "medium", "urgency": "expedited"}},
        refused: {"reasons": reasons, "risk": None},
    }
    for lesion_id, answer in answers.items():
        image = uuid4()
        await connection.execute("INSERT INTO lesions VALUES ($1, 'p', now())", lesion_id)
        await connection.execute(
            "INSERT INTO lesion_images (image_id, lesion_id, patient_id, created_at, content_type, width, height,"
            " data_key_id, sealed) VALUES ($1, $2, 'p', now(), 'image/png', 1, 1, $1, 'x')",
            *(image, lesion_id),
        )
        await connection.execute(
            "INSERT INTO assessments (assessment_id, image_id, created_at, outcome, answer, completed_at, context,"
            " top_k, licences, actor, request_id) VALUES ($1, $1, now(), 'review', $2, now(), '{}', 1, '{}', 'a', 'r')",
            *(image, json.dumps(answer)),
        )
    await migrate(urls.owner, application_role="derm_app")
    found = [json.loads(await connection.fetchval("SELECT open_demand($1)", each)) for each in answers]
    # And is counted for the reports.
    assert await connection.fetchval("SELECT count_reports(10)") == 2
    levels = await connection.fetch("SELECT level::text FROM assessment_facts ORDER BY 1")
    await connection.close()
    assert [row["level"] for row in levels] == ["high", "medium"]
    assert [(each["level"], each["urgency"]) for each in found] == [
        ("medium", "expedited"),
        ("high", "urgent"),
    ]


async def test_what_was_demanded_before_lesions_could_be_linked_is_as_it_was(
    new_database, tmp_path: Path
) -> None:
    early = tmp_path / "early"
    early.mkdir()
    for path in MIGRATIONS.glob("*.sql"):
        if path.name < "0031":
            shutil.copy(path, early)
    urls = await new_database(migrated=False)
    await migrate(urls.owner, application_role=None, directory=early)
    connection = await asyncpg.connect(urls.owner)
    lesion, images = uuid4(), [uuid4(), uuid4(), uuid4()]
    await connection.execute("INSERT INTO lesions VALUES ($1, 'p', now())", lesion)
    for number, (image, level) in enumerate(zip(images, ("low", "high", None), strict=True)):
        await connection.execute(
            "INSERT INTO lesion_images (image_id, lesion_id, patient_id, created_at, content_type, width, height,"
            " data_key_id, sealed) VALUES ($1, $2, 'p', now() + $3 * interval '1 s', 'image/png', 1, 1, $1, 'x')",
            *(image, lesion, number),
        )
        await connection.execute(
            "INSERT INTO assessments (assessment_id, image_id, created_at, outcome, answer, completed_at, context,"
            " top_k, licences, actor, request_id, demand_level, demand_urgency)"
            " VALUES ($1, $1, now(), 'review', '{}', now(), '{}', 1, '{}', 'a', 'r', $2, $3)",
            *(image, level, level and "routine"),
        )

    async def read() -> Mapping[str, Any]:
        demand = json.loads(await connection.fetchval("SELECT open_demand($1)", lesion))
        held = await connection.fetchval("SELECT array_agg(is_held(i)) FROM lesion_images AS i")
        return {**demand, "held": held}

    before = await read()
    assert (before["level"], before["image_id"], before["held"]) == ("high", str(images[1]), [False] * 3)
    await migrate(urls.owner, application_role="derm_app")
    assert await read() == before
    assert await connection.fetchval("SELECT count(*) FROM lesion_links") == 0
    await connection.close()

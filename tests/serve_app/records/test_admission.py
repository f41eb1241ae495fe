"""T1: an image is kept whole and once, or not at all."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Conflict, IntegrityError, InvalidField
from serve_app.domain.review import Impression, Referral
from serve_app.records.reconciliation import reconcile

COUNTS = """
SELECT (SELECT count(*) FROM lesions) AS lesions, (SELECT count(*) FROM lesion_images) AS images,
    (SELECT count(*) FROM assessments) AS assessments, (SELECT count(*) FROM audit_events) AS events,
    (SELECT count(*) FROM idempotency_keys) AS keys
"""


@pytest.fixture
def growth(owner_pool):
    """Return what an action added to the tables: lesions, images, assessments, events, keys."""

    async def measure(action) -> tuple[int, ...]:
        before = await owner_pool.fetchrow(COUNTS)
        await action
        after = await owner_pool.fetchrow(COUNTS)
        return tuple(new - old for new, old in zip(after, before, strict=True))

    return measure


async def _refused(action, error) -> None:
    with pytest.raises(error):
        await action


async def test_an_admission_is_pending_sealed_and_audited(lesions, admission, growth, owner_pool) -> None:
    new = admission()
    assert await growth(lesions.admit(new)) == (1, 1, 1, 1, 0)
    record = await lesions.assessment_record(new.assessment_id)
    assert (record.lesion_id, record.patient_id) == (new.lesion_id, new.patient_id)
    assert record.image.assessment is None
    assert record.image.created_at == new.created_at
    image = await lesions.sealed_image(new.lesion_id, new.image_id)
    assert (image.patient_id, image.content_type, image.sealed) == ("patient", "image/png", new.sealed)
    assert await lesions.sealed_image(uuid4(), new.image_id) is None
    event = await owner_pool.fetchrow("SELECT * FROM audit_events WHERE image_id = $1", new.image_id)
    assert (event["action"], event["patient_id"], [*event["detail"]]) == ("upload", "patient", ["rows"])


async def test_twenty_at_once_with_one_key_make_one_record(
    lesions, admission, growth, request_digest
) -> None:
    rivals = [admission(idempotency_key="race", request_sha256=request_digest) for _ in range(20)]
    outcomes: list = []

    async def race() -> None:
        outcomes.extend(await asyncio.gather(*(lesions.admit(rival) for rival in rivals)))

    assert await growth(race()) == (1, 1, 1, 1, 1)
    assert outcomes.count(None) == 1
    winner = rivals[outcomes.index(None)]
    replays = {outcome for outcome in outcomes if outcome is not None}
    assert replays == {await lesions.find_replay("dr", "race")}
    (replay,) = replays
    assert (replay.assessment_id, replay.lesion_id) == (winner.assessment_id, winner.lesion_id)
    assert replay.request_sha256 == request_digest


async def test_a_key_belongs_to_its_caller(lesions, admission, request_digest) -> None:
    for actor in ("dr-a", "dr-b"):
        new = admission(actor=actor, idempotency_key="mine", request_sha256=request_digest)
        assert await lesions.admit(new) is None
    assert await lesions.find_replay("dr-c", "mine") is None


async def test_no_image_under_another_patients_or_no_lesion(lesions, admission, growth) -> None:
    first = admission()
    await lesions.admit(first)
    wrong = [
        admission(lesion_id=first.lesion_id, new_lesion=False, patient_id="other"),
        admission(new_lesion=False),
        admission(lesion_id=first.lesion_id),
        admission(image_id=first.image_id),
    ]
    for each in wrong:
        assert await growth(_refused(lesions.admit(each), Conflict)) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize("text", ["nul\x00", "surrogate\ud800"])
async def test_what_no_database_can_hold_is_the_callers_mistake(lesions, admission, growth, text) -> None:
    new = admission(encounter_id=text)
    assert await growth(_refused(lesions.admit(new), InvalidField)) == (0, 0, 0, 0, 0)


async def test_only_sealed_images_are_kept(lesions, admission, growth) -> None:
    new = admission(sealed=b"\xff\xd8\xff" + bytes(1000))
    assert await growth(_refused(lesions.admit(new), IntegrityError)) == (0, 0, 0, 0, 0)


async def test_errors_do_not_quote_patients(lesions, admission) -> None:
    first = admission(patient_id="patient-with-a-name")
    await lesions.admit(first)
    with pytest.raises(Conflict) as caught:
        await lesions.admit(first)
    assert "patient-with-a-name" not in str(caught.value)
    assert caught.value.__cause__ is None


async def test_an_impression_is_vouched_for(lesions, admission, owner_pool, database, as_superuser) -> None:
    """One that was changed, taken away or added behind the service's back shows."""

    async def found() -> list[str]:
        differences = (await reconcile(owner_pool)).differences
        return [each.what for each in differences if each.table == "reviews"]

    for given in (
        Impression(Diagnosis.BCC, Referral.NONE),
        Impression(intended_referral=Referral.URGENT),
        None,
    ):
        await lesions.admit(admission(impression=given))
    assert await owner_pool.fetchval("SELECT count(*) FROM reviews") == 2
    assert await found() == []
    tamperer = await asyncpg.connect(as_superuser(database))
    await tamperer.execute("SET session_replication_role = replica")  # no trigger
    await tamperer.execute("UPDATE reviews SET impression_diagnosis = 'NV'")
    assert await found() == ["is not what its event says"] * 2
    await tamperer.execute("DELETE FROM reviews WHERE intended_referral = 'none'")
    await tamperer.close()
    assert sorted(await found()) == ["is gone", "is not what its event says"]

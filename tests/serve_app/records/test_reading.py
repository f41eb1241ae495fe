"""What the record tells: access, timelines, lists, earlier images."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import numpy as np

from serve_app.domain.assessment import Outcome

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)


async def test_access_says_whose_lesion_it_is(lesions, owner_pool, admission) -> None:
    patient = str(uuid4())
    new = admission(patient_id=patient)
    await lesions.admit(new)
    await owner_pool.execute("INSERT INTO care_assignments VALUES ($1, 'dr', $2)", patient, NOW - HOUR)
    assert (await lesions.access("dr", patient, new.lesion_id)).lesion_patient == patient
    assert (await lesions.access("dr", patient, uuid4())).lesion_patient is None
    other = await lesions.access("dr", "somebody else", new.lesion_id)
    assert (other.assigned, other.lesion_patient) == (False, patient)
    own = await lesions.access("dr", None, new.lesion_id)
    assert (own.assigned, own.lesion_patient) == (True, patient)
    assert not (await lesions.access("dr", None, uuid4())).assigned


async def test_the_list_pages_in_a_stable_order(lesions, admission) -> None:
    patient = str(uuid4())
    new = [admission(patient_id=patient, created_at=NOW + timedelta(seconds=i // 3)) for i in range(11)]
    for each in new:
        await lesions.admit(each)
    await lesions.admit(
        admission(patient_id=patient, lesion_id=new[0].lesion_id, new_lesion=False, created_at=NOW + HOUR)
    )
    seen, cursor = [], None
    while page := await lesions.patient_lesions(patient, limit=4, cursor=cursor):
        seen += page
        cursor = (page[-1].created_at, page[-1].lesion_id)
        # What comes in while paging goes to the front, and moves nothing.
        late = admission(patient_id=patient, created_at=NOW + 2 * HOUR)
        await lesions.admit(late)
    expected = sorted(new, key=lambda each: (each.created_at, each.lesion_id), reverse=True)
    assert [each.lesion_id for each in seen] == [each.lesion_id for each in expected]
    assert seen[-1].latest.created_at in {NOW, NOW + HOUR}
    first = next(each for each in seen if each.lesion_id == new[0].lesion_id)
    assert first.latest.created_at == NOW + HOUR
    assert await lesions.patient_lesions("nobody", limit=4) == []


async def test_previous_is_the_newest_classified_image_before(
    lesions, admission, assessment, event, space
) -> None:
    first = admission(created_at=NOW - 4 * HOUR)
    later = [
        admission(lesion_id=first.lesion_id, new_lesion=False, created_at=NOW - hours * HOUR)
        for hours in (3, 2, 1)
    ]
    for each in (first, *later):
        await lesions.admit(each)
    assert await lesions.previous(first.lesion_id, before=NOW, embedding_space=space) is None
    done = {"embedding_space": space, "event": event("assess")}
    await lesions.complete(first.assessment_id, assessment(), **done)
    refused = assessment(outcome=Outcome.REFUSED, classification=None, embedding=None)
    await lesions.complete(later[1].assessment_id, refused, **done)
    previous = await lesions.previous(first.lesion_id, before=NOW, embedding_space=space)
    assert (previous.image_id, previous.created_at) == (first.image_id, first.created_at)
    assert previous.probabilities == assessment().classification.probabilities
    assert previous.embedding.dtype == np.float32
    np.testing.assert_allclose(previous.embedding, assessment().embedding, atol=1e-4)
    elsewhere = await lesions.previous(first.lesion_id, before=NOW, embedding_space="another")
    assert elsewhere.embedding is None
    assert await lesions.previous(first.lesion_id, before=first.created_at, embedding_space=space) is None

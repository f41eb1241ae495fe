"""T2 and recovery: every pending assessment is completed, and once."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from serve_app.domain.assessment import Outcome


@pytest.fixture
async def pending(lesions, admission, space):
    new = admission()
    await lesions.admit(new)
    return new


async def test_an_assessment_is_completed_once_and_no_late_claimer_overwrites_it(
    lesions, assessment, event, pending, space, owner_pool
) -> None:
    done = assessment()
    (claim,) = await lesions.claim_pending(lease_s=0.01, limit=10)
    first = event("assess", assessment_id=pending.assessment_id)
    rivals = [
        lesions.complete(pending.assessment_id, done, embedding_space=space, event=first) for _ in range(8)
    ]
    assert sorted(await asyncio.gather(*rivals)) == [False] * 7 + [True]
    late = assessment(outcome=Outcome.DECIDED)
    assert not await lesions.complete(claim.assessment_id, late, embedding_space=space, event=first)
    assert await lesions.claim_pending(lease_s=1, limit=10) == []
    query = "SELECT count(*) FROM audit_events WHERE action = 'assess' AND assessment_id = $1"
    assert await owner_pool.fetchval(query, pending.assessment_id) == 1
    record = await lesions.assessment_record(pending.assessment_id)
    assert record.image.assessment.outcome is Outcome.REVIEW
    assert record.image.assessment.neighbours == done.neighbours
    query = "SELECT embedding FROM lesion_embeddings WHERE image_id = $1"
    kept = (await owner_pool.fetchval(query, pending.image_id)).to_numpy()
    np.testing.assert_array_equal(kept, done.embedding.astype(np.float16))


async def test_claimers_never_share_an_assessment(lesions, admission, space) -> None:
    await lesions.claim_pending(lease_s=3600, limit=1000)
    new = [admission() for _ in range(30)]
    for each in new:
        await lesions.admit(each)
    claims = [lesions.claim_pending(lease_s=60, limit=7) for _ in range(10)]
    claimed = [each for batch in await asyncio.gather(*claims) for each in batch]
    left = await lesions.claim_pending(lease_s=60, limit=100)
    found = [each.assessment_id for each in (*claimed, *left)]
    assert sorted(found) == sorted(each.assessment_id for each in new)


async def test_a_claim_holds_all_that_is_needed_and_comes_back_after_its_lease(lesions, pending) -> None:
    (claim,) = await lesions.claim_pending(lease_s=0.2, limit=10)
    names = {*claim.__dataclass_fields__} - {"attempts"}
    assert {name: getattr(claim, name) for name in names} == {name: getattr(pending, name) for name in names}
    assert claim.attempts == 1
    assert await lesions.claim_pending(lease_s=1, limit=10) == []
    await asyncio.sleep(0.25)
    (again,) = await lesions.claim_pending(lease_s=3600, limit=10)
    assert (again.assessment_id, again.attempts) == (pending.assessment_id, 2)

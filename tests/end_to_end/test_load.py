"""Many at once: answered, or told when to come again."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tests.end_to_end.conftest import draw_original

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("count", "large"), [(50, False), (15, True)])
async def test_many_at_once_are_answered_or_told_when_to_come_again(
    pms, lesion_image, capsys, count: int, *, large: bool
) -> None:
    """Fifteen originals of 12 MB are more than the ingress lets in at once, and than the object store holds."""
    images = [draw_original(2000, seed=1)] if large else [lesion_image(seed) for seed in range(10)]
    patient = await pms.care()
    sent = (pms.upload(patient, images[number % len(images)]) for number in range(count))
    responses = await asyncio.gather(*sent)
    statuses = Counter(response.status_code for response in responses)
    for response in responses:
        assert response.status_code in {201, 202, 429, 503}, response.text
        if response.status_code != 201:
            assert int(response.headers["retry-after"]) > 0
        if response.status_code in {201, 202}:
            assert await pms.original(response.json()) in images
    assert statuses[201]
    await pms.until_none_pending()
    stored = await pms.owner.fetchval("SELECT count(*) FROM lesions WHERE patient_id = $1", patient)
    assert stored == statuses[201] + statuses[202]
    with capsys.disabled():
        print(f"\n{count} of {len(images[0]) / 1e6:.1f} MB at once: {dict(statuses)}")

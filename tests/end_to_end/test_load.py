"""Many at once: answered, or told when to come again."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

pytestmark = pytest.mark.ray


async def test_fifty_at_once_are_answered_or_told_when_to_come_again(pms, lesion_image, capsys) -> None:
    images = [lesion_image(seed) for seed in range(10)]
    patient = await pms.care()
    responses = await asyncio.gather(*(pms.upload(patient, images[i % 10]) for i in range(50)))
    statuses = Counter(response.status_code for response in responses)
    for response in responses:
        assert response.status_code in {201, 202, 429, 503}, response.text
        if response.status_code != 201:
            assert int(response.headers["retry-after"]) > 0
        if response.status_code in {201, 202}:
            assert await pms.original(response.json()) in images
    await pms.until_none_pending()
    stored = await pms.owner.fetchval("SELECT count(*) FROM lesions WHERE patient_id = $1", patient)
    assert stored == statuses[201] + statuses[202]
    with capsys.disabled():
        print(f"\n50 at once: {dict(statuses)}")


async def test_large_originals_at_once_are_answered_or_told_when_to_come_again(
    pms, large_original, capsys
) -> None:
    """Fifteen of 12 MB: more than the ingress lets in at once, and than the object store holds."""
    image = large_original(2000)
    patient = await pms.care()
    responses = await asyncio.gather(*(pms.upload(patient, image) for _ in range(15)))
    statuses = Counter(response.status_code for response in responses)
    for response in responses:
        assert response.status_code in {201, 202, 429, 503}, response.text
        if response.status_code != 201:
            assert int(response.headers["retry-after"]) > 0
    assert statuses[201]
    await pms.until_none_pending()
    with capsys.disabled():
        print(f"\n15 originals of {len(image) / 1e6:.0f} MB at once: {dict(statuses)}")

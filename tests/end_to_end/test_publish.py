"""A new model and its space go live under load, and back: no request fails, no answer mixes two spaces."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from data_jobs.promotion.rollback import roll_back
from data_jobs.references.embedder import identify_embedder
from data_jobs.references.load import publish_space, read_bundle
from model_store.registry import ModelStore
from serve_app.records.references import ReferenceCache, ReferenceStore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

AT_ONCE = 3


@pytest.fixture(scope="module")
async def twin_space(pms, node, twin_id) -> str:
    """The twin's references beside the live ones; nothing answers in them yet."""
    model = ModelStore(node.models).open(twin_id)
    spec = model.manifest.live_space
    bundle = read_bundle(model, spec)
    await ReferenceStore(pms.owner).load(
        bundle.images, bundle.embeddings, embedding_space=spec.embedding_space
    )
    await ReferenceCache(pms.owner).reassign(identify_embedder(model, spec), expected=spec.count)
    return spec.embedding_space


async def test_publishing_and_rolling_back_under_load(
    pms, node, model_id, twin_id, twin_space, lesion_image, capsys
) -> None:
    patient, images = await pms.care(), [lesion_image(seed) for seed in range(AT_ONCE)]
    answers: list[tuple[int, dict]] = []
    statuses: Counter[int] = Counter()
    over = asyncio.Event()

    async def work(turn: int) -> None:
        while not over.is_set():
            response = await pms.upload(patient, images[turn])
            statuses[response.status_code] += 1
            answers.append((turn, response.json()))
            await asyncio.sleep(0.2)

    workers = [asyncio.create_task(work(turn)) for turn in range(AT_ONCE)]
    try:
        await _until(answers, lambda answer: answer["provenance"]["model_id"] == model_id)
        await publish_space(pms.owner, node.models, twin_id)
        await _until(answers, lambda answer: answer["provenance"]["model_id"] == twin_id)
        await asyncio.sleep(1)
        back = await roll_back(node.urls.owner, node.models, approved_by="operator", reason="drill")
        assert back.model_id == model_id
        await _until(answers, lambda answer: answer["provenance"]["model_id"] == model_id)
        await asyncio.sleep(1)
    finally:
        over.set()
        await asyncio.gather(*workers)
    assert set(statuses) == {201}, statuses
    original = ModelStore(node.models).open(model_id).manifest.live_space.embedding_space
    pairs = Counter((a["provenance"]["model_id"], a["provenance"]["embedding_space"]) for _, a in answers)
    assert set(pairs) == {(model_id, original), (twin_id, twin_space)}
    nearest: dict[int, list[float]] = {}
    for turn, answer in answers:
        nearest.setdefault(turn, []).append(answer["similar"][0]["similarity"])
    # Halves of turned vectors round otherwise; a vector of the other space would be near to nothing.
    assert all(max(found) - min(found) < 0.01 for found in nearest.values()), nearest
    # Whichever model answered, its answers can be made again, whoever is live by now.
    for wanted in (model_id, twin_id):
        answer = next(a for _, a in answers if a["provenance"]["model_id"] == wanted)
        response = await pms.client.post(
            f"/api/lesions/{answer['lesion_id']}/assessments/{answer['assessment_id']}/replay",
            headers=pms.token(),
        )
        assert response.json()["verdict"] == "identical", response.text
    with capsys.disabled():
        print(f"\npublished and rolled back at {AT_ONCE} at once: {dict(pairs)}")


async def _until(answers: list[tuple[int, dict]], seen) -> None:
    """Wait for an answer from now on that is what it should be."""
    start, deadline = len(answers), asyncio.get_running_loop().time() + 90
    while not any(seen(answer) for _, answer in answers[start:]):
        assert asyncio.get_running_loop().time() < deadline, answers[-1:]
        await asyncio.sleep(0.1)

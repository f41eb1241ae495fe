"""A search with an image on record that cannot be had: each a clear problem, and once in the audit log."""

from __future__ import annotations

import io
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
from PIL import Image
import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import StageFailed
from serve_app.lesions import similar as searcher
from serve_app.records.references import ReferenceCache, ReferenceImage, ReferenceStore
from tests.serve_app.erasure.erasing import erase, uploaded
from tests.serve_app.lesions.conftest import failing, hang
from tests.serve_app.lesions.test_similar import ask, found


async def one_failure(service, response: httpx.Response, status: int, code: str) -> None:
    """A problem, and its one event: it names the search, and nothing that was asked for."""
    service.hold_to_problem(response, status, code)
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"]) == ("read", "failed")
    assert event["detail"] == {"search": "similar", "code": code}


@pytest.fixture(scope="module")
async def assessed(service) -> dict[str, Any]:
    return await uploaded(service)


async def test_an_image_that_this_lesion_does_not_have_is_not_found(service, assessed) -> None:
    other = (await service.upload(assessed["patient_id"])).json()
    for image_id in (str(uuid4()), other["image_id"]):
        await one_failure(service, await ask(service, {**assessed, "image_id": image_id}), 404, "not_found")


async def test_an_erased_image_is_gone(service) -> None:
    answer = await uploaded(service)
    assert (await erase(service, answer)).status_code == 200
    owner = await service.care("dr", answer["patient_id"])
    assert owner == answer["patient_id"]
    await one_failure(service, await ask(service, answer), 410, "erased")


async def test_a_refused_image_has_nothing_to_search_with(service) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300)).save(buffer, "PNG")
    answer = await uploaded(service, image=buffer.getvalue())
    assert answer["outcome"] == "refused"
    await one_failure(service, await ask(service, answer), 409, "no_embedding")


async def _move(service, answer: dict[str, Any], space: str) -> None:
    """Have the image be one that was assessed in another space, when that was the live one."""
    image_id = UUID(answer["image_id"])
    await service.owner.execute(
        "UPDATE lesion_embeddings SET embedding_space = $2 WHERE image_id = $1", image_id, space
    )
    await service.owner.execute(
        "UPDATE assessments SET answer = jsonb_set(answer, '{provenance,embedding_space}', to_jsonb($2::text))"
        " WHERE image_id = $1",
        image_id,
        space,
    )


async def test_it_is_searched_in_the_space_it_was_assessed_in_while_that_is_there(service) -> None:
    answer, space = await uploaded(service), f"old-{uuid4().hex[:8]}"
    vectors = np.random.default_rng(5).normal(size=(2, 512))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    olds = [
        ReferenceImage(f"OLD_{n}", None, kind, "histo", None, None, "torso", "CC-0", "Anonymous")
        for n, kind in enumerate((Diagnosis.MEL, Diagnosis.NV))
    ]
    await ReferenceStore(service.owner).load(olds, vectors, embedding_space=space)
    await _move(service, answer, space)
    body = await found(service, answer)
    assert body["embedding_space"] == space
    assert sorted(case["isic_id"] for case in body["similar"]) == ["OLD_0", "OLD_1"]
    assert (await found(service, answer, {"diagnosis": "DF"}))["similar"] == []
    assert await ReferenceCache(service.owner).drop(space) == 2
    for params in ({}, {"diagnosis": "DF"}):
        await one_failure(service, await ask(service, answer, params), 409, "references_dropped")


async def test_a_pending_and_a_failed_image_have_nothing_to_search_with(alterable) -> None:
    service, stages = alterable
    with stages.altered("classify", failing(StageFailed())):
        upload = await service.upload(await service.care())
    assert upload.status_code == 202
    response = await ask(service, upload.json())
    await one_failure(service, response, 409, "assessment_pending")
    assert int(response.headers["retry-after"]) > 0
    await service.owner.execute(
        "UPDATE assessments SET outcome = 'failed', failure = 'integrity', completed_at = now()"
        " WHERE image_id = $1",
        UUID(upload.json()["image_id"]),
    )
    await one_failure(service, await ask(service, upload.json()), 409, "no_embedding")


async def test_a_stage_that_fails_or_hangs_is_said_so_and_is_on_record(alterable, monkeypatch) -> None:
    service, stages = alterable
    answer = await uploaded(service)
    monkeypatch.setattr(searcher, "DEADLINE_S", 0.2)
    for change in (failing(StageFailed()), hang):
        with stages.altered("nearest", change):
            response = await ask(service, answer)
        await one_failure(service, response, 503, "stage_failed")
        assert int(response.headers["retry-after"]) > 0
    monkeypatch.undo()
    assert (await found(service, answer))["similar"] == answer["similar"]

"""A search with an image on record that cannot be had: each a clear problem, and once in the audit log."""

from __future__ import annotations

import asyncio
import io
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
from PIL import Image
import pytest

from serve_app.domain.diagnosis import Diagnosis
from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.lesions import similar as searcher
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceImage, ReferenceStore
from tests.serve_app.erasure.erasing import erase, uploaded
from tests.serve_app.lesions.test_pending import Faulty, failing, recover
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


async def test_a_stranger_learns_nothing(service, assessed) -> None:
    nowhere = {"lesion_id": str(uuid4()), "image_id": str(uuid4())}
    refusals = [await ask(service, asked, subject="stranger") for asked in (assessed, nowhere)]
    details = {service.hold_to_problem(refusal, 403, "forbidden")["detail"] for refusal in refusals}
    assert len(details) == 1
    for refusal in refusals:
        (event,) = await service.events(refusal)
        assert (event["action"], event["outcome"]) == ("read", "denied")


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


async def test_a_pending_image_is_to_be_asked_for_again(start_service, local_stages) -> None:
    async with start_service(
        Faulty(local_stages(), "classify", failing(StageFailed()), calls={1})
    ) as service:
        upload = await service.upload(await service.care())
        assert upload.status_code == 202
        response = await ask(service, upload.json())
        await one_failure(service, response, 409, "assessment_pending")
        assert int(response.headers["retry-after"]) > 0
        assert await recover(service) == 1
        assert (await found(service, upload.json()))["similar"]


async def test_an_image_that_could_not_be_assessed_has_nothing_to_search_with(
    start_service, local_stages
) -> None:
    async with start_service(
        Faulty(local_stages(), "classify", failing(StageFailed()), calls={1})
    ) as service:
        answer = (await service.upload(await service.care())).json()
        await service.owner.execute(
            "UPDATE assessments SET outcome = 'failed', failure = 'integrity', completed_at = now()"
            " WHERE image_id = $1",
            UUID(answer["image_id"]),
        )
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


async def test_a_stage_that_fails_is_said_so_and_is_on_record(start_service, local_stages) -> None:
    # The upload's own search is the first.
    async with start_service(Faulty(local_stages(), "nearest", failing(StageFailed()), calls={2})) as service:
        answer = await uploaded(service)
        response = await ask(service, answer)
        await one_failure(service, response, 503, "stage_failed")
        assert int(response.headers["retry-after"]) > 0
        assert (await found(service, answer))["similar"] == answer["similar"]


async def test_a_search_that_hangs_ends_at_the_deadline(start_service, local_stages, monkeypatch) -> None:
    async with start_service(
        Faulty(local_stages(), "nearest", lambda: asyncio.sleep(3600), calls={2})
    ) as service:
        answer = await uploaded(service)
        monkeypatch.setattr(searcher, "DEADLINE_S", 0.2)
        await one_failure(service, await ask(service, answer), 503, "stage_failed")


async def test_what_is_refused_at_capacity_is_no_event(start_service, local_stages) -> None:
    async with start_service(Faulty(local_stages(), "nearest", failing(Overloaded()), calls={2})) as service:
        answer = await uploaded(service)
        response = await ask(service, answer)
        service.hold_to_problem(response, 503, "overloaded")
        assert await service.events(response) == []


async def test_searches_take_places_of_uploads(start_service, local_stages) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        reached.set()
        await go_on.wait()

    stages = Faulty(local_stages(), "nearest", wait, calls={2})
    async with start_service(stages, max_uploads_in_flight=1) as service:
        answer = await uploaded(service)
        first = asyncio.create_task(ask(service, answer))
        await asyncio.wait_for(reached.wait(), 20)
        response = await ask(service, answer)
        service.hold_to_problem(response, 503, "overloaded")
        assert int(response.headers["retry-after"]) > 0
        go_on.set()
        assert (await first).status_code == 200
        assert (await ask(service, answer)).status_code == 200


async def test_who_asks_too_often_waits(start_service, local_stages) -> None:
    async with start_service(local_stages(), rate_limit_per_s=0.01, rate_limit_burst=2) as service:
        answer = await uploaded(service)
        await service.care("dr-often", answer["patient_id"])
        answers = [await ask(service, answer, subject="dr-often") for _ in range(4)]
        assert [response.status_code for response in answers] == [200, 200, 429, 429]
        service.hold_to_problem(answers[-1], 429, "rate_limited")

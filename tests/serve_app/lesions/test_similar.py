"""The confirmed cases like an image on record, under any filter: found, or a problem; once in the audit log."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest

from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import StageFailed
from serve_app.lesions import assess
from serve_app.records.references import ReferenceCache, ReferenceImage, ReferenceStore
from tests.serve_app.erasure.erasing import change, erase, path, uploaded
from tests.serve_app.lesions.conftest import failing, hang


async def ask(service, answer: dict[str, Any], params: Any = None) -> httpx.Response:
    return await service.get(f"{path(answer)}/similar", params=params)


async def found(service, answer: dict[str, Any], params: Any = None) -> dict[str, Any]:
    response = await ask(service, answer, params)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    service.hold_to("SimilarCasesDocument", body)
    return body


@pytest.fixture(scope="module")
async def assessed(service) -> dict[str, Any]:
    """An image with its answer; its neighbours are of more than one diagnosis."""
    answer = await uploaded(service)
    assert answer["outcome"] in {"decided", "review"}
    return answer


async def test_without_a_filter_it_is_what_the_assessment_found(service, assessed) -> None:
    shown = (await found(service, assessed))["similar"]
    assert shown == assessed["similar"]
    async with service.storing_nothing():  # as many as an assessment weighs
        response = await ask(service, assessed, {"top_k": 16})
    body = response.json()
    assert body["similar"][:10] == shown
    assert body == {
        "lesion_id": assessed["lesion_id"],
        "image_id": assessed["image_id"],
        "embedding_space": assessed["provenance"]["embedding_space"],
        "similar": body["similar"],
        "neighbours": assessed["neighbours"],
    }
    event = await service.hold_to_event(response, "read", "success", about=assessed, search="similar")
    assert event["actor"] == "dr"


BENIGN = [diagnosis for diagnosis in TRAINED if diagnosis not in MALIGNANT]
FIELDS = {"licence": "copyright_license"}


@pytest.mark.parametrize(
    "limits",
    [
        {"diagnosis": ["NV", "BKL", "NV"]},
        {"anatom_site_general": ["head/neck"]},
        {"anatom_site_general": ["anterior torso", "lower extremity"], "diagnosis": ["NV"]},
        {"licence": ["CC-0", "CC-BY-NC"]},
        {"confirmed": ["true"], "diagnosis": BENIGN},
        {"diagnosis": sorted(MALIGNANT)},
    ],
    ids=str,
)
async def test_every_filter_limits_all_that_is_shown(service, assessed, limits: dict[str, list[str]]) -> None:
    def passes(case: dict[str, Any]) -> bool:
        sent = {FIELDS.get(name, name): values for name, values in limits.items() if name != "confirmed"}
        confirmed = "confirmed" not in limits or case["diagnosis_confirm_type"] is not None
        return confirmed and all(case[field] in values for field, values in sent.items())

    every = await found(service, assessed, {"top_k": 50})
    body = await found(service, assessed, {**limits, "top_k": 50})
    nearest = list(filter(passes, every["similar"]))
    assert nearest or limits["diagnosis"] == sorted(MALIGNANT)
    assert body["similar"]
    assert body["similar"][: len(nearest)] == nearest
    assert all(map(passes, body["similar"]))
    kinds = [case["diagnosis"] in MALIGNANT for case in body["similar"]]
    shown = body["neighbours"]
    assert shown["malignant_share"] == pytest.approx(sum(kinds) / len(kinds))
    for name, malignant in (("nearest_benign", False), ("nearest_malignant", True)):
        kinds_sent = limits.get("diagnosis", list(TRAINED))
        possible = any((kind in MALIGNANT) is malignant for kind in kinds_sent)
        assert (shown[name] is not None) == possible
        if malignant in kinds:
            assert shown[name] == body["similar"][kinds.index(malignant)]


@pytest.mark.parametrize(
    "params",
    [
        {"diagnosis": "UNK"},
        {"diagnosis": ["MEL", "melanoma"]},
        {"licence": "GPL"},
        {"anatom_site_general": "elbow"},
        {"top_k": "51"},
    ],
    ids=str,
)
async def test_an_unknown_value_is_a_clear_problem(service, assessed, params) -> None:
    response = await ask(service, assessed, params)
    body = await service.hold_to_failure(response, 422, "invalid_field", "read")
    assert body["detail"].startswith(f"{next(iter(params))}: ")
    assert "melanoma" not in body["detail"]


async def one_failure(service, response: httpx.Response, status: int, code: str) -> None:
    """A problem, and its one event: it names the search, and nothing that was asked for."""
    service.hold_to_problem(response, status, code)
    assert (status == 503 or code == "assessment_pending") == ("retry-after" in response.headers)
    await service.hold_to_event(response, "read", "failed", search="similar", code=code)


async def test_an_image_that_this_lesion_does_not_have_or_no_longer_is_not_searched_with(service) -> None:
    answer, other = [await uploaded(service) for _ in range(2)]
    for image_id in (str(uuid4()), other["image_id"]):
        await one_failure(service, await ask(service, {**answer, "image_id": image_id}), 404, "not_found")
    assert (await erase(service, answer)).status_code == 200
    await service.care("dr", answer["patient_id"])
    await one_failure(service, await ask(service, answer), 410, "erased")


async def test_an_image_without_an_embedding_has_nothing_to_search_with(faulty, stages, black) -> None:
    answer = await uploaded(faulty, image=black)
    assert answer["outcome"] == "refused"
    await one_failure(faulty, await ask(faulty, answer), 409, "no_embedding")
    with stages.altered("classify", failing(StageFailed())):
        pending = (await faulty.upload(await faulty.care())).json()
    await one_failure(faulty, await ask(faulty, pending), 409, "assessment_pending")
    failed = "outcome = 'failed', failure = 'integrity', completed_at = now()"
    await change(faulty, pending, "assessments", failed)
    await one_failure(faulty, await ask(faulty, pending), 409, "no_embedding")


async def test_it_is_searched_in_the_space_it_was_assessed_in_while_that_is_there(service) -> None:
    answer, space = await uploaded(service), f"old-{uuid4().hex[:8]}"
    vectors = np.random.default_rng(5).normal(size=(2, 512))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    olds = [
        ReferenceImage(f"OLD_{n}", None, kind, "histo", None, None, "torso", "CC-0", "Anonymous")
        for n, kind in enumerate((Diagnosis.MEL, Diagnosis.NV))
    ]
    await ReferenceStore(service.owner).load(olds, vectors, embedding_space=space)
    await change(service, answer, "lesion_embeddings", "embedding_space = $2", space)
    moved = "answer = jsonb_set(answer, '{provenance,embedding_space}', to_jsonb($2::text))"
    await change(service, answer, "assessments", moved, space)
    body = await found(service, answer)
    assert body["embedding_space"] == space
    assert sorted(case["isic_id"] for case in body["similar"]) == ["OLD_0", "OLD_1"]
    assert (await found(service, answer, {"diagnosis": "DF"}))["similar"] == []
    assert await ReferenceCache(service.owner).drop(space) == 2
    for params in ({}, {"diagnosis": "DF"}):
        await one_failure(service, await ask(service, answer, params), 409, "references_dropped")


async def test_a_stage_that_fails_or_hangs_is_said_so_and_is_on_record(
    faulty, stages, monkeypatch, answer
) -> None:
    monkeypatch.setattr(assess, "DEADLINE_S", 0.2)
    for change_of_stage in (failing(StageFailed()), hang):
        with stages.altered("nearest", change_of_stage):
            await one_failure(faulty, await ask(faulty, answer), 503, "stage_failed")
    monkeypatch.undo()
    assert (await found(faulty, answer))["similar"] == answer["similar"]

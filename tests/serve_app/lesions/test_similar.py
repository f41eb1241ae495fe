"""The confirmed cases like an image on record, under any filter: found, or a problem; once in the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
import pytest

from serve_app.domain.assessment import EVERY_REFERENCE, ReferenceFilter, SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import StageFailed
from serve_app.lesions import similar as searcher
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceImage, ReferenceStore
from tests.serve_app.erasure.erasing import change, erase, path, uploaded
from tests.serve_app.lesions.conftest import failing, hang


async def ask(service, answer: dict[str, Any], params: Any = None) -> httpx.Response:
    return await service.client.get(f"{path(answer)}/similar", params=params, headers=service.token("dr"))


async def found(service, answer: dict[str, Any], params: Any = None) -> dict[str, Any]:
    response = await ask(service, answer, params)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    service.hold_to("SimilarCasesDocument", body)
    return body


async def nearest(service, answer: dict[str, Any], k: int, limits: ReferenceFilter) -> dict[str, Any]:
    """What the store finds, exactly, of the same references."""
    row = await service.owner.fetchrow(
        "SELECT embedding, embedding_space FROM lesion_embeddings WHERE image_id = $1",
        UUID(answer["image_id"]),
    )
    store = ReferenceStore(service.owner, exact_below=10**9)
    neighbours = await store.nearest(
        row["embedding"].to_numpy().astype(np.float32),
        embedding_space=row["embedding_space"],
        k=k,
        reference_filter=limits,
    )
    return asdict(neighbours)


def same(shown: dict[str, Any] | None, case: dict[str, Any] | None) -> bool:
    if shown is None or case is None:
        return shown is case
    return {name: shown[name] for name in SimilarCase.__dataclass_fields__} == case


@pytest.fixture(scope="module")
async def assessed(service) -> dict[str, Any]:
    """An image with its answer; its neighbours are of more than one diagnosis."""
    answer = await uploaded(service)
    assert answer["outcome"] in {"decided", "review"}
    return answer


async def test_without_a_filter_it_is_what_the_assessment_found(service, assessed) -> None:
    shown = (await found(service, assessed))["similar"]
    assert shown == assessed["similar"]
    before = await service.counts()
    # As many as an assessment weighs.
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
    (event,) = await service.events(response)
    assert (event["action"], event["actor"], event["outcome"]) == ("read", "dr", "success")
    assert event["patient_id"] == assessed["patient_id"]
    assert [str(event[name]) for name in ("lesion_id", "image_id")] == [
        assessed[name] for name in ("lesion_id", "image_id")
    ]
    assert event["detail"] == {"search": "similar"}
    assert await service.counts() == {**before, "audit_events": before["audit_events"] + 1}


@pytest.mark.parametrize(
    ("params", "limits"),
    [
        ({"top_k": "3"}, EVERY_REFERENCE),
        ({"diagnosis": ["NV", "BKL", "NV"]}, ReferenceFilter(diagnoses=(Diagnosis.NV, Diagnosis.BKL))),
        (
            {"anatom_site_general": ["anterior torso", "palms/soles"], "diagnosis": "NV"},
            ReferenceFilter(sites=("anterior torso", "palms/soles"), diagnoses=(Diagnosis.NV,)),
        ),
        ({"licence": ["CC-0", "CC-BY-NC"]}, ReferenceFilter(licences=("CC-0", "CC-BY-NC"))),
        (
            {"confirmed": "true", "diagnosis": "AK"},
            ReferenceFilter(confirmed_only=True, diagnoses=(Diagnosis.AK,)),
        ),
    ],
    ids=str,
)
async def test_every_filter_limits_all_that_is_shown(service, assessed, params, limits) -> None:
    k = int(params.get("top_k", 10))
    body, wanted = await found(service, assessed, params), await nearest(service, assessed, k, limits)
    assert body["similar"]
    assert len(body["similar"]) == len(wanted["similar"]) <= k
    assert all(map(same, body["similar"], wanted["similar"]))
    shown = body["neighbours"]
    assert shown["malignant_share"] == wanted["malignant_share"]
    assert same(shown["nearest_benign"], wanted["nearest_benign"])
    assert same(shown["nearest_malignant"], wanted["nearest_malignant"])


async def test_a_filter_of_one_kind_leaves_no_nearest_of_the_other(service, assessed) -> None:
    benign = [diagnosis for diagnosis in TRAINED if diagnosis not in MALIGNANT]
    for kinds, share, none in (
        (benign, 0.0, "nearest_malignant"),
        (list(MALIGNANT), 1.0, "nearest_benign"),
    ):
        body = await found(service, assessed, {"diagnosis": kinds})
        assert len(body["similar"]) == 10
        assert body["neighbours"]["malignant_share"] == share
        assert body["neighbours"][none] is None


async def test_the_upload_knows_no_filter_by_diagnosis_or_site(service) -> None:
    for asked in ({"diagnosis": "DF"}, {"anatom_site_general": "palms/soles"}):
        response = await service.upload(await service.care(), params=asked)
        service.hold_to_problem(response, 422, "invalid_field")


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
    body = service.hold_to_problem(response, 422, "invalid_field")
    assert body["detail"].startswith(f"{next(iter(params))}: ")
    assert "melanoma" not in body["detail"]
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"]) == ("read", "failed")
    assert event["detail"] == {"code": "invalid_field"}


async def one_failure(service, response: httpx.Response, status: int, code: str) -> None:
    """A problem, and its one event: it names the search, and nothing that was asked for."""
    service.hold_to_problem(response, status, code)
    assert (status == 503 or code == "assessment_pending") == ("retry-after" in response.headers)
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"]) == ("read", "failed")
    assert event["detail"] == {"search": "similar", "code": code}


async def test_an_image_that_this_lesion_does_not_have_or_no_longer_is_not_searched_with(service) -> None:
    answer, other = [await uploaded(service) for _ in range(2)]
    for image_id in (str(uuid4()), other["image_id"]):
        await one_failure(service, await ask(service, {**answer, "image_id": image_id}), 404, "not_found")
    assert (await erase(service, answer)).status_code == 200
    await service.care("dr", answer["patient_id"])
    await one_failure(service, await ask(service, answer), 410, "erased")


async def test_an_image_without_an_embedding_has_nothing_to_search_with(alterable, black) -> None:
    service, stages = alterable
    answer = await uploaded(service, image=black)
    assert answer["outcome"] == "refused"
    await one_failure(service, await ask(service, answer), 409, "no_embedding")
    with stages.altered("classify", failing(StageFailed())):
        pending = (await service.upload(await service.care())).json()
    await one_failure(service, await ask(service, pending), 409, "assessment_pending")
    failed = "outcome = 'failed', failure = 'integrity', completed_at = now()"
    await change(service, pending, "assessments", failed)
    await one_failure(service, await ask(service, pending), 409, "no_embedding")


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


async def test_a_stage_that_fails_or_hangs_is_said_so_and_is_on_record(alterable, monkeypatch) -> None:
    service, stages = alterable
    answer = await uploaded(service)
    monkeypatch.setattr(searcher, "DEADLINE_S", 0.2)
    for change_of_stage in (failing(StageFailed()), hang):
        with stages.altered("nearest", change_of_stage):
            await one_failure(service, await ask(service, answer), 503, "stage_failed")
    monkeypatch.undo()
    assert (await found(service, answer))["similar"] == answer["similar"]

"""The confirmed cases like an image on record, under any filter: found, refused, and once in the audit log."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
import io
from typing import Any
from uuid import UUID, uuid4

import httpx
import numpy as np
from PIL import Image
import pytest

from serve_app.api import searcher
from serve_app.api.reference_query import ReferenceDiagnosis
from serve_app.domain.assessment import SimilarCase
from serve_app.domain.diagnosis import MALIGNANT, TRAINED, Diagnosis
from serve_app.domain.errors import Overloaded, StageFailed
from serve_app.domain.reference_filter import EVERY_REFERENCE, ReferenceFilter
from serve_app.records.reference_cache import ReferenceCache
from serve_app.records.references import ReferenceImage, ReferenceStore
from tests.api.erasing import erase, path, uploaded
from tests.api.test_pending import Faulty, failing, recover

DR = ("clinician",)


async def ask(
    service, answer: dict[str, Any], params: Any = None, *, subject: str = "dr", roles: tuple[str, ...] = DR
) -> httpx.Response:
    return await service.client.get(
        f"{path(answer)}/similar", params=params, headers=service.token(subject, roles)
    )


async def found(service, answer: dict[str, Any], params: Any = None) -> dict[str, Any]:
    response = await ask(service, answer, params)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    service.hold_to("SimilarCasesDocument", body)
    return body


async def one_failure(service, response: httpx.Response, status: int, code: str) -> None:
    """A problem, and its one event: it names the search, and nothing that was asked for."""
    service.hold_to_problem(response, status, code)
    (event,) = await service.events(response)
    assert (event["action"], event["outcome"]) == ("read", "failed")
    assert event["detail"] == {"search": "similar", "code": code}


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
    before = await service.counts()
    response = await ask(service, assessed)
    body = response.json()
    assert body == {
        "lesion_id": assessed["lesion_id"],
        "image_id": assessed["image_id"],
        "embedding_space": assessed["provenance"]["embedding_space"],
        "similar": assessed["similar"],
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
        ({"diagnosis": "MEL"}, ReferenceFilter(diagnoses=(Diagnosis.MEL,))),
        ({"diagnosis": "DF", "top_k": "50"}, ReferenceFilter(diagnoses=(Diagnosis.DF,))),
        ({"diagnosis": ["NV", "BKL", "NV"]}, ReferenceFilter(diagnoses=(Diagnosis.NV, Diagnosis.BKL))),
        ({"anatom_site_general": "head/neck"}, ReferenceFilter(sites=("head/neck",))),
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
    body, wanted = (
        await found(service, assessed, params),
        await nearest(service, assessed, k, limits),
    )
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


async def test_a_filter_that_nothing_passes_finds_nothing(service, assessed) -> None:
    counted = await service.owner.fetch(
        "SELECT diagnosis, anatom_site_general FROM reference_images GROUP BY 1, 2"
    )
    there = {tuple(row) for row in counted}
    diagnosis, site = next(
        (diagnosis, site)
        for site in ("oral/genital", "lateral torso", "palms/soles")
        for diagnosis in TRAINED
        if (diagnosis, site) not in there
    )
    body = await found(service, assessed, {"diagnosis": diagnosis, "anatom_site_general": site})
    assert body["similar"] == []
    assert body["neighbours"] == {"malignant_share": None, "nearest_benign": None, "nearest_malignant": None}


async def test_the_upload_knows_no_filter_by_diagnosis_or_site(service, drawn_lesion) -> None:
    """The risk is drawn from its neighbours: a malignant one that is hidden could lower it."""
    operation = service.document["paths"]["/api/lesions"]["post"]
    assert {one["name"] for one in operation["parameters"] if one["in"] == "query"} == {
        *("top_k", "licence", "confirmed"),
    }
    patient = await service.care()
    plain = (await service.upload(patient)).json()
    tried = await service.upload(patient, params={"diagnosis": "DF", "anatom_site_general": "palms/soles"})
    assert [tried.json()[name] for name in ("similar", "neighbours", "risk")] == [
        plain[name] for name in ("similar", "neighbours", "risk")
    ]


def test_every_diagnosis_that_a_reference_can_have_can_be_asked_for() -> None:
    assert ReferenceDiagnosis.__args__ == TRAINED


@pytest.mark.parametrize(
    "params",
    [
        {"diagnosis": "UNK"},
        {"diagnosis": ["MEL", "melanoma"]},
        {"diagnosis": "mel"},
        {"licence": "GPL"},
        {"anatom_site_general": "elbow"},
        {"confirmed": "perhaps"},
        {"top_k": "0"},
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
